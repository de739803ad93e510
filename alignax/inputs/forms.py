"""Whether a loss can read a data set: the forms of its rows against those of the loss.

What a row is, `batch.form` tells; what a loss reads, its module says in FORMS. A loss on
rows of another form would still give a number: DPO on a scored group takes its first
response for the chosen one, and SFT on a pair imitates the rejected side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignax.batch import FORMS, Example, form

# Forms whose feedback says something; the others have none, which makes zeros in a batch.
WITH_FEEDBACK = ("labelled", "mismatched", "pairs", "groups")


class Found(NamedTuple):
    """The rows of one form in a data set."""

    number: int
    first: str  # id of the first one


def feedback(example: Example) -> tuple[float, ...]:
    """The feedback of an example, one number per response; (1, 0) of a pair without any.

    Returns:
      () for forms that have no feedback.

    Raises:
      ValueError: feedback for another number of responses, a form of another number of
        responses, an unknown form, or a form with feedback whose row has none.
    """
    kind, given, many = (
        form(example),
        tuple(map(float, example.feedback)),
        len(example.responses),
    )
    if kind not in FORMS:
        raise ValueError(f"form is {kind!r}, expected one of {', '.join(FORMS)}")
    if given and len(given) != many:
        raise ValueError(f"{len(given)} feedback values for {many} responses")
    twos = ("pairs", "mismatched")
    if (kind in twos and many != 2) or (kind == "labelled" and many != 1):
        raise ValueError(f"{many} responses, but its form is {kind!r}: {FORMS[kind]}")
    if kind in WITH_FEEDBACK and not given:
        if kind == "pairs":
            return (1.0, 0.0)
        raise ValueError(f"its form is {kind!r}, but it has no label or score")
    return given


def tally(examples: Sequence[Example]) -> dict[str, Found]:
    """How many rows of each form a data set holds, and the first of each.

    Args:
      examples: their attribute `forms`, if any, is {form: (count, id of the first)} as
        counted before; without it every example is read once.
    """
    known = getattr(examples, "forms", None)
    if known is not None:
        return {kind: Found(*found) for kind, found in known.items()}
    out: dict[str, Found] = {}
    for i in range(len(examples)):
        example = examples[i]
        kind = form(example)
        count, first = out.get(kind, (0, example.id))
        out[kind] = Found(count + 1, first)
    return out


def check(
    found: Mapping[str, Sequence[Any]], accepted: Sequence[str], loss: str,
    where: str = "config.data", section: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Raises ValueError if a loss cannot read all rows of a data set.

    Prompts without a response among other rows are no error here: whatever reads the rows
    counts them as malformed.

    Args:
      found: {form: (count, id of the first)}, from `tally` or from whatever read the rows.
      accepted: the FORMS of the loss; () takes every row that has a response.
      loss: its name.
      where: the key of the config that the data came from.
      section: what that key holds, for the line that makes the rows fit.

    Raises:
      ValueError: names the loss, what it reads, what there is, and what makes it fit.
    """
    with_responses = {k: v for k, v in found.items() if k != "prompts"}
    if not found:
        return  # an empty data set is an error of whatever reads its rows
    if not with_responses:
        reads = " or ".join(accepted) or "rows that have a response"
        raise ValueError(
            f"{loss} reads {reads}; {where} holds {_described('prompts', found)}. "
            f"{_remedy('prompts', accepted, where, section)}"
        )
    if not accepted:
        _check_labels(with_responses, loss, where)
        return
    odd = [k for k in with_responses if k not in accepted]
    if not odd:
        return
    reads = " or ".join(f"{k} ({FORMS[k]})" for k in accepted)
    holds = " and ".join(_described(k, found) for k in odd)
    fitting = [f"{v[0]} {k}" for k, v in with_responses.items() if k in accepted]
    beside = f"beside {' and '.join(fitting)} it" if fitting else "it"
    remedies = dict.fromkeys(
        _remedy(k, accepted, where, section, mixed=bool(fitting)) for k in odd
    )
    raise ValueError(
        f"{loss} reads {reads}; this is not what {where} holds: {beside} has {holds}. "
        + " ".join(remedies)
    )


def _check_labels(
    found: Mapping[str, Sequence[Any]], loss: str, where: str
) -> None:  # fmt: skip
    """Raises ValueError where some rows have feedback and others would get zeros."""
    without = [k for k in found if k not in WITH_FEEDBACK]
    if without and len(without) < len(found):
        has = " and ".join(f"{v[0]} {k}" for k, v in found.items() if k not in without)
        raise ValueError(
            f"{where} holds {' and '.join(_described(k, found) for k in without)}, whose "
            f"missing feedback would count as 0 beside {has}. If {loss} is to read both, "
            "say so in its module: FORMS = (...)"
        )


def _described(kind: str, found: Mapping[str, Sequence[Any]]) -> str:
    """Such as "3 groups (two or more ..., the first is train.jsonl:1)"."""
    count, first = found[kind]
    return (
        f"{count} {kind} ({FORMS.get(kind, 'an unknown form')}; the first is {first})"
    )


def _remedy(
    kind: str, accepted: Sequence[str], where: str, section: Mapping[str, Any] | None,
    mixed: bool = False,
) -> str:  # fmt: skip
    """The line of a config, or the change of the rows, after which a loss reads them.

    Args:
      kind: the form of the rows that it does not read.
      accepted: the forms that it reads.
      where: the key of the config.
      section: what that key holds.
      mixed: there are rows of the right form beside them.
    """
    outer = {k: v for k, v in (section or {}).items() if k in ("split", "ratio")}
    inner = {k: v for k, v in (section or {}).items() if k not in outer}
    inner = inner or {"name": "jsonl", "path": "..."}

    def wrapped(name: str, **more: Any) -> str:
        line = {"name": name, "split": "train", **outer, "source": inner, **more}
        return f"{where} = {line!r}"

    wanted = next((k for k in REMEDIES if k in accepted), "demonstrations")
    text = REMEDIES[wanted].get(kind, REMEDIES[wanted][""])
    if mixed and wanted in KINDS and kind != "mismatched":
        text = LEFT_OUT
    return text.format(
        where=where, kind=KINDS.get(wanted), pairing=wrapped("pairing"),
        unpaired=wrapped("unpaired"), single=wrapped("unpaired", mismatched=False),
        inner={"split": "train", **outer, **inner},
    )  # fmt: skip


KINDS = {"pairs": "pairs", "groups": "groups", "demonstrations": "sft"}  # of data.jsonl
LEFT_OUT = (
    "Take these rows out of the file, or set {where}.kind = {kind!r} (of data.jsonl), which "
    "converts those that it can and counts the others as malformed."
)
# What makes rows fit: {form that is wanted: {form that there is, "" for any: text}}. Of
# several forms that a loss reads, the first one here is recommended.
REMEDIES = {
    "pairs": {
        "groups": "Set {where}.kind = 'pairs' (of data.jsonl), which puts two responses in "
        "the order of their scores; for more than two, {pairing} chooses pairs.",
        "unscored": "Which response is better is not said: give each row 'scores', or "
        "'chosen' and 'rejected' (an Example of your own: feedback=(1, 0)).",
        "mismatched": "Leave data.unpaired out: {where} = {inner[source]!r}.",
        "": "Give each row a 'chosen' and a 'rejected' response.",
    },
    "mismatched": {
        "demonstrations": "Give each row a 'label', then set {unpaired}.",
        "unscored": "Give each row 'scores', or 'chosen' and 'rejected', then set {unpaired}.",
        "": "Set {unpaired}.",
    },
    "labelled": {
        "pairs": "Set {single}.",
        "groups": "Set {single}.",
        "mismatched": "Set {where}.mismatched = False.",
        "": "Give each row a 'label' (of data.jsonl): a missing one is not 0.",
    },
    "groups": {
        "": "Give each row two or more 'responses', and 'scores' with a number for each."
    },
    "demonstrations": {
        "pairs": "Set {where}.kind = 'sft' (of data.jsonl and data.hh_rlhf), which takes "
        "the chosen response.",
        "groups": "Set {where}.kind = 'sft' (of data.jsonl), which takes the best response.",
        "labelled": "Set {where}.kind = 'sft' (of data.jsonl), which takes the responses "
        "whose label is above 0.5, or {where}.labelled = False of data.forget_retain.",
        "mismatched": "Leave data.unpaired out: {where} = {inner[source]!r}, and its kind = "
        "'sft'.",
        "": "Give each row a 'response', or 'messages'.",
    },
    "prompts": {
        "": "It learns from rollouts alone: set config.rollout.reward.",
    },
}

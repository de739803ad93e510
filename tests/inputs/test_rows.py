"""Every example is used or counted with a reason, whatever it holds; used rows are sound."""

import chat_families as families
import pytest
from chat_families import FAMILIES, assistant, texts, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignax import batch
from alignax.batch import Example
from alignax.inputs import plan, rows
from alignax.text import truncation

few = settings(
    max_examples=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
PARTS = st.lists(
    st.one_of(
        st.builds(lambda t: {"type": "text", "text": t}, texts()),
        st.just({"type": "image", "url": "x.png"}), texts(),
    ),
    max_size=3,
)  # fmt: skip
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}]
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "tool", "system",
                              "developer", "x"]),
     "content": st.one_of(texts(), texts(), texts(), st.none(), PARTS)},
    optional={
        "reasoning_content": texts(), "tool_calls": st.just(CALLS), "name": texts(),
        "weight": st.sampled_from([0, 1]), "train": st.booleans(), "prefill": texts(),
        "extra": st.integers(),
    },
)  # fmt: skip
SIMPLE = st.lists(texts(), min_size=1, max_size=5).map(
    lambda said: [(user, assistant)[i % 2](t) for i, t in enumerate(said)]
)
DIALOGUE = st.one_of(SIMPLE, SIMPLE, st.lists(TURNS, max_size=4))
PROMPT = st.one_of(texts(), DIALOGUE, DIALOGUE)
BEGUN = st.builds(
    lambda t, n: [assistant(t, prefill=t[:n])], texts(), st.integers(0, 5)
)
ANSWER = st.one_of(texts(), texts(), texts().map(lambda t: [assistant(t)]), BEGUN,
                   st.lists(TURNS, max_size=3))  # fmt: skip
TEMPLATE = st.sampled_from([{}, {}, {"enable_thinking": False}, {"tools": CALLS}])


@st.composite
def rows_of_all_forms(draw):
    answers = draw(st.lists(ANSWER, min_size=1, max_size=3))
    many, scores = len(answers), st.sampled_from([0.0, 1.0, 2.5])
    feedback = draw(
        st.sampled_from(
            [
                (),
                (1.0, 0.0),
                tuple(draw(st.lists(scores, min_size=many, max_size=many))),
            ]
        )
    )
    form = draw(st.sampled_from(["", "", "", *batch.FORMS]))
    if form in ("pairs", "mismatched"):
        answers = (answers * 2)[:2]
    return Example(
        "f:1", draw(PROMPT), answers, feedback, form=form, template=draw(TEMPLATE)
    )


EXAMPLES = rows_of_all_forms()
READINGS = st.fixed_dictionaries(
    {
        "truncate": st.sampled_from(list(truncation.RULES)),
        "system": st.sampled_from(["refuse", "user"]),
        "specials": st.sampled_from(["text", "tokens"]),
        "raw": st.booleans(),
        "min_response": st.sampled_from([0, 1, 5]),
    }
)


@pytest.mark.parametrize("family", [*FAMILIES, "bytes"])
def test_every_example_is_used_or_counted(family):
    text = families.load(family)

    @few
    @given(st.lists(EXAMPLES, min_size=1, max_size=4), READINGS, st.integers(6, 120))
    def check(examples, reading, length):
        examples = [e._replace(id=f"f:{i}") for i, e in enumerate(examples)]
        read = text.read_as(text.reading._replace(**reading))
        counts = rows.no_counts(reasons=True)
        used = list(rows.stream(examples, read, length=length, counts=counts))
        lost = counts["dropped"] + counts["malformed"]
        assert (counts["read"], counts["used"]) == (len(examples), len(used))
        assert len(used) + lost == len(examples)
        reasons = [*counts["dropped_ids"], *counts["malformed_ids"]]
        assert len(reasons) == lost
        assert all(len(line.partition(": ")[2]) > 3 for line in reasons), reasons
        assert sorted(
            [r.id for r in used] + [x.partition(": ")[0] for x in reasons]
        ) == [e.id for e in examples]
        for row in used:
            sound(row, examples[int(row.id[2:])], read, length)
        if used:
            group = max(len(r.responses) for r in used)
            batch.check(plan.build([*used, None], group, length, text.pad_id))

    check()


def sound(row, example, text, length):
    assert row.length() <= length
    assert len(row.prompt) >= 1
    assert len(row.responses) == len(example.responses)
    for ids, mark in zip(row.responses, row.scored, strict=True):
        assert len(ids) == len(mark)
    own = rows.own_responses(example)
    for mark in row.scored[:own]:
        assert mark.any()
        if text.reading.truncate != "prompt":
            assert mark[-1], (
                "what is behind the last scored token is no part of the row"
            )
    assert row.length() < length or row.length() == length
    whole = [row.prompt, *row.responses]
    assert max(int(ids.max()) for ids in whole if len(ids)) < text.vocab_size


@pytest.mark.parametrize("family", [*FAMILIES, "bytes"])
def test_the_prompt_is_whole_where_the_row_was_not_cut(family):
    """And where only the response was; no control token of a user's is one."""
    text = families.load(family)

    @few
    @given(SIMPLE.filter(lambda said: len(said) % 2), texts(), st.integers(8, 200))
    def check(said, answer, length):
        example = Example("f:1", said, [answer])
        counts = rows.no_counts()
        used = list(rows.stream([example], text, length=length, counts=counts))
        if not used or counts["cut_prompt"]:
            return
        whole = text.tokenize(example)
        assert used[0].prompt.tolist() == whole.prompt_ids
        many = len(used[0].responses[0])
        assert used[0].responses[0].tolist() == whole.responses[0][:many]
        assert counts["cut_response"] == (many < len(whole.responses[0]))
        # As many control ids as the template writes for texts without any.
        control = set(text.encoder.control.values()) - {text.eos_id}
        bare = [{**m, "content": "x"} for m in said]
        mine = [i for i in text.prompt(said) if i in control]
        assistants = " ".join(m["content"] for m in said if m["role"] == "assistant")
        if not any(token in assistants for token in text.encoder.control):
            assert mine == [i for i in text.prompt(bare) if i in control]

    check()


def test_nothing_usable_is_an_error_that_says_why():
    text = families.load("chatml")
    with pytest.raises(ValueError, match="no response"):
        rows.read([Example("f:1", "q", [])], text, length=20)
    with pytest.raises(ValueError, match="empty"):
        rows.read([], text, length=20)
    with pytest.raises(ValueError, match="length is 1"):
        list(rows.stream([], text, length=1, counts=rows.no_counts()))

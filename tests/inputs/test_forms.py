"""Rows that a loss does not read are refused before weights are read or code compiles."""

import json
import re

import numpy as np
import pytest
import tiny

from alignax import plugin
from alignax.batch import FORMS, Example
from alignax.data import Examples
from alignax.inputs import forms
from alignax.inputs.rows import Row
from alignax.training import build, loading

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
GROUP = {"prompt": "Q", "responses": ["bad", "good"], "scores": [1, 9]}
UNSCORED = {"prompt": "Q", "responses": ["one", "two", "three"]}
PLAIN = {"prompt": "Q", "completion": "an answer"}
WRONG = {  # loss and rows -> what the error says beside the name of the loss
    "dpo group": ("groups", "config.data.kind = 'pairs'", "'name': 'pairing'"),
    "reward_model group": ("groups", "config.data.kind = 'pairs'"),
    "npo plain": ("demonstrations", "'label'"),
    "gradient_ascent plain": ("demonstrations", "'label'"),
    "simnpo plain": ("demonstrations", "'label'"),
    "bco plain": ("demonstrations", "'label'"),
    "kto pair": ("pairs", "config.data = {'name': 'unpaired', 'split': 'train', "),
    "sft pair": ("pairs", "config.data.kind = 'sft'"),
    "token_constrained pair": ("pairs", "config.data.kind = 'sft'"),
    "rrhf unscored": ("unscored", "'scores'"),
    "ranking unscored": ("unscored", "'scores'"),
    "pro unscored": ("unscored", "'scores'"),
}
ROWS = {"group": GROUP, "plain": PLAIN, "pair": PAIR, "unscored": UNSCORED}


class Read(Exception):
    """Weights would be read now."""


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "jsonl", "split": "train", "path": str(path)}


def numbered(row, many=4):
    return [{**row, "prompt": f"{row['prompt']}{i}"} for i in range(many)]


def config(loss, data, **changes):
    needs = plugin.load("losses", loss).needs
    c = tiny.config(**changes)
    c.loss, c.data = {"name": loss}, data
    c.lms = {k: "init" for n in needs if (k := plugin.frozen_lm(n))}
    c.model.value_head = "values" in needs
    return c


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Puts a run together; raises Read where all checks before the weights passed."""

    def read(*_):
        raise Read

    monkeypatch.setattr(loading, "make_policy", read)
    return lambda c: build.build(c, str(tmp_path / "run"))


def refusal(start, c):
    with pytest.raises(ValueError) as error:
        start(c)
    return str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_combination_is_an_error_that_says_what_makes_it_fit(
    case, start, tmp_path
):
    loss, rows = case.split()
    c = config(loss, write(tmp_path, *numbered(ROWS[rows])))
    text = refusal(start, c)
    form, *remedies = WRONG[case]
    assert text.startswith(f"loss 'losses.{loss}' reads ")
    assert f"4 {form} ({FORMS[form]}; the first is rows.jsonl:1)" in text
    assert all(remedy in text for remedy in remedies), text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", [c for c in WRONG if "plain" not in c])
def test_what_an_error_recommends_makes_the_rows_fit(case, start, tmp_path):
    loss, rows = case.split()
    data = write(tmp_path, *numbered(ROWS[rows]))
    text = refusal(start, config(loss, data))
    for line in re.findall(r"config\.data(?:\.kind)? = (\{.*?\}\}|'\w+')", text):
        found = eval(line)  # as a config would
        fitting = {**data, "kind": found} if isinstance(found, str) else found
        with pytest.raises(Read):
            start(config(loss, fitting))


@pytest.mark.parametrize("odd", [PLAIN, {**PLAIN, "label": 1}, UNSCORED])
def test_odd_rows_among_pairs_are_named(odd, start, tmp_path):
    rows = numbered(PAIR)
    data = write(tmp_path, rows[0], odd, *rows[1:], odd)
    text = refusal(start, config("dpo", data))
    assert "beside 4 pairs" in text
    assert re.search(r"has 2 \w+ \(.*; the first is rows.jsonl:2\)", text)
    with pytest.raises(Read):  # they are counted as malformed
        start(config("dpo", {**data, "kind": "pairs"}))


OF_PAIRS = [
    name
    for name in plugin.available("reweight")
    if "pairs" in plugin.load("reweight", name).forms
]


@pytest.mark.parametrize("name", OF_PAIRS)
def test_reweightings_of_pairs_refuse_single_responses(name, start, tmp_path):
    data = {"name": "unpaired", "split": "train"}
    data["source"] = write(tmp_path, *numbered(PAIR))
    c = config("kto", data)
    with pytest.raises(Read):
        start(c)
    c.reweight = {name: {}}
    text = refusal(start, c)
    assert f"reweight.{name} weighs pairs" in text
    assert "losses.kto reads mismatched" in text


def test_a_mixture_is_refused_by_its_part(start, tmp_path):
    (tmp_path / "plain").mkdir()
    good = {**write(tmp_path, *numbered(PAIR)), "ratio": 3}
    wrong = {**write(tmp_path / "plain", *numbered(PLAIN)), "ratio": 1}
    c = config("dpo", {})
    c.mixture = {"good": good, "plain": wrong}
    text = refusal(start, c)
    assert "config.mixture.plain holds: it has 4 demonstrations" in text
    c.mixture = {"good": good, "more": good}
    with pytest.raises(Read):
        start(c)


def test_prompts_alone_need_rollouts(start, tmp_path):
    data = write(tmp_path, *numbered({"prompt": "Q"}))
    assert "4 prompts" in refusal(start, config("sft", data))
    own = config("dpo", data)
    own.loss = {"name": "tiny.slow_dpo"}
    assert "reads rows that have a response" in refusal(start, own)


def test_rollouts_read_the_prompts_of_any_rows(start, tmp_path):
    for row in ({"prompt": "Q"}, PLAIN, PAIR, GROUP, UNSCORED):
        data = write(tmp_path, *numbered(row))
        c = config("dpo", data)
        c.rollout.reward = {"name": "alignax.data.synthetic.judge"}
        c.rollout.group, c.rollout.keep, c.rollout.max_new = 2, "best_worst", 8
        with pytest.raises(Read):
            start(c)


@pytest.mark.parametrize("loss, keep", [("kto", "best_worst"), ("sft", "best_worst")])
def test_what_rollouts_keep_is_what_the_loss_reads(loss, keep, start, tmp_path):
    c = config(loss, write(tmp_path, *numbered({"prompt": "Q"})))
    c.rollout.reward = {"name": "alignax.data.synthetic.judge"}
    c.rollout.group, c.rollout.keep, c.rollout.max_new = 4, keep, 8
    assert "rollouts with rollout.keep='best_worst' make pairs" in refusal(start, c)


@pytest.mark.parametrize("row", [PLAIN, {**PLAIN, "label": 0}, PAIR, GROUP, UNSCORED])
def test_a_loss_of_ones_own_reads_everything_that_has_responses(row, start, tmp_path):
    c = config("dpo", write(tmp_path, *numbered(row)))
    c.loss = {"name": "tiny.slow_dpo"}
    with pytest.raises(Read):
        start(c)


def test_a_missing_label_beside_labels_is_no_zero(start, tmp_path):
    c = config("dpo", write(tmp_path, {**PLAIN, "label": 1}, *numbered(PLAIN, 2)))
    c.loss = {"name": "tiny.slow_dpo"}
    text = refusal(start, c)
    assert "2 demonstrations" in text
    assert "the first is rows.jsonl:2" in text
    assert "FORMS = (...)" in text


def test_counts_made_elsewhere_are_taken_instead_of_the_rows():
    counted = Examples([Example("a", "Q", [])])
    counted.forms = {"pairs": (7, "x:3")}
    assert forms.tally(counted) == {"pairs": (7, "x:3")}
    forms.check(forms.tally(counted), ("pairs",), "loss")
    with pytest.raises(ValueError, match=r"it has 7 pairs .* the first is x:3"):
        forms.check(forms.tally(counted), ("groups",), "loss")


def test_a_tally_counts_each_form_and_names_its_first_row():
    rows = [
        Example("a", "Q", ["x", "y"], (1.0, 0.0)),
        Example("b", "Q", ["x"]),
        Example("c", "Q", ["x", "y"], (4.0, 9.0)),
        Example("d", "Q", ["x", "y"], (9.0, 4.0), form="pairs"),
    ]
    assert forms.tally(rows) == {
        "pairs": (2, "a"), "demonstrations": (1, "b"), "groups": (1, "c")
    }  # fmt: skip


def test_feedback_is_that_of_the_form():
    def of(*feedback, form="", responses=2):
        return forms.feedback(Example("a", "Q", ["x"] * responses, feedback, form=form))

    assert of(form="pairs") == (1.0, 0.0)
    assert of(9, 4, form="pairs") == (9.0, 4.0)
    assert of() == ()
    assert of(0, responses=1) == (0.0,)
    wrong = ((dict(form="labelled", responses=1), "no label or score"),
             (dict(form="mismatched"), "no label or score"),
             (dict(form="pairs", responses=3), "3 responses, but its form is 'pairs'"),
             (dict(form="labelled"), "2 responses, but its form is 'labelled'"),
             (dict(form="pair"), "form is 'pair', expected one of"))  # fmt: skip
    for fields, text in wrong:
        with pytest.raises(ValueError, match=text):
            of(**fields)
    with pytest.raises(ValueError, match="1 feedback values for 2 responses"):
        of(1)


def test_a_row_without_its_label_is_malformed():
    from alignax.inputs import rows
    from alignax.text import tokenizer

    data = [
        Example("a", "Q", ["x"], form="labelled"),
        Example("b", "Q", ["x", "y"], form="pairs"),
    ]
    counts = rows.no_counts()
    text = tokenizer.load("bytes")
    (row,) = rows.read(data, text, length=16, counts=counts)
    assert isinstance(row, Row)
    np.testing.assert_array_equal(row.feedback, (1.0, 0.0))
    assert "a: its form is 'labelled'" in counts["malformed_ids"][0]


def test_an_unknown_form_in_a_module_is_an_error(monkeypatch):
    monkeypatch.setattr(tiny, "FORMS", ("pair",), raising=False)
    with pytest.raises(
        ValueError, match="FORMS holds 'pair', expected some of prompts"
    ):
        plugin.load("losses", "tiny.slow_dpo")
    monkeypatch.setattr(tiny, "FORMS", "pairs", raising=False)
    assert plugin.load("losses", "tiny.slow_dpo").forms == ("pairs",)

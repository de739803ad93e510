"""Rows of a prompts file with settings of their own, and log-probabilities by token."""

import json

import numpy as np
import pytest
import tiny

from alignax.respond import respond

ROWS = [
    {"prompt": "Say a word", "temperature": 0.0, "max_new": 2},
    {"prompt": "Say something longer than that", "temperature": 1.5, "max_new": 6},
    {"prompt": "Go", "temperature": 0.0, "max_new": 4.0},
]


def config(folder, rows=ROWS, **changes):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"generate.per_row": ("temperature", "max_new"), **changes}
    c = tiny.to_respond(folder, **changes)
    c.prompts = {"name": "prompts", "path": str(path), "size": 0}
    return c


def lines(folder):
    text = (folder / respond.NAME).read_text("utf-8")
    return [json.loads(x) for x in text.splitlines()]


def test_rows_are_answered_with_their_own_settings(tmp_path):
    assert respond.respond(config(tmp_path), str(tmp_path / "run"))
    found = lines(tmp_path / "run")
    for row, line in zip(ROWS, found, strict=True):
        assert max(line["tokens"]) <= row["max_new"]
        assert "length" not in line["finish"] or max(line["tokens"]) == row["max_new"]
        alike = line["responses"][0] == line["responses"][1]
        assert alike == (row["temperature"] == 0)
        certain = [x == 0 for x in line["law_logps"]]
        assert all(certain) == (row["temperature"] == 0)


def test_a_draft_keeps_the_settings_of_rows(tmp_path):
    c = config(tmp_path, **{"generate.draft": "ngram"})
    assert respond.respond(c, str(tmp_path / "run"))
    for row, line in zip(ROWS, lines(tmp_path / "run"), strict=True):
        assert max(line["tokens"]) <= row["max_new"]


def test_other_settings_of_rows_are_another_file(tmp_path):
    assert respond.respond(config(tmp_path), str(tmp_path / "run"))
    colder = [dict(row, temperature=0.5) for row in ROWS]
    with pytest.raises(ValueError, match=r"settings of rows"):
        respond.respond(config(tmp_path, colder), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "row", "told"),
    [
        ({"generate.per_row": ("temprature",)}, {}, r"per_row has 'temprature'; a row"),
        ({}, {"temperature": -1}, r"prompts.jsonl:2: the row's temperature is -1, exp"),
        (
            {},
            {"temperature": "hot"},
            r"the row's temperature is 'hot', expected a numb",
        ),
        ({}, {"max_new": None}, r"the row's max_new is None, expected a whole number"),
        ({}, {"max_new": 2.5}, r"the row's max_new is 2.5, expected a whole number"),
        ({}, {"max_new": 7}, r"the row's max_new is 7, more than .*max_new=6"),
        (
            {"generate.min_new": 3},
            {},
            r"prompts.jsonl:1: max_new is 2, but min_new is 3",
        ),
        (
            {"generate.forced": "abc"},
            {},
            r"min_new is 0 and the forced text has 3 tokens",
        ),
    ],
)
def test_wrong_settings_are_named_before_weights_are_read(tmp_path, changes, row, told):
    rows = [ROWS[0], {**ROWS[1], **row}, ROWS[2]]
    with pytest.raises(ValueError, match=told):
        respond.check(config(tmp_path, rows, **changes))


def test_a_stop_counts_from_the_least_length_of_its_row(tmp_path):
    """What was sampled behind an early stop stays in the text, and a late stop is cut."""
    letters = tuple(chr(i) for i in range(33, 127))
    rows = [{"prompt": "Go", "min_new": 4}, {"prompt": "Stay", "min_new": 0}]
    for name, least in (("none", 0), ("most", 4)):
        c = config(tmp_path, rows, **{
            "generate.per_row": ("min_new",), "generate.stops": letters,
            "generate.min_new": least, "generate.logit_bias": [(i, 9.0) for i in range(33, 127)],
        })  # fmt: skip
        assert respond.respond(c, str(tmp_path / name))
        late, early = lines(tmp_path / name)
        assert min(late["tokens"]) >= 4
        assert all(len(text) >= 3 for text in late["responses"])
        assert early["responses"] == ["", ""]


def test_a_search_has_one_setting_for_all_prompts(tmp_path):
    c = config(tmp_path)
    c.decoder = {"name": "best_of_n", "n": 2}
    with pytest.raises(ValueError, match=r"best_of_n has the same settings for all"):
        respond.respond(c, str(tmp_path / "run"))


def test_log_probabilities_of_every_token_add_up(tmp_path):
    c = config(tmp_path, **{"generate.token_logps": True, "generate.prefill": "Ok"})
    assert respond.respond(c, str(tmp_path / "run"))
    for line in lines(tmp_path / "run"):
        for name in ("logps", "law_logps"):
            sums = [np.sum(x) for x in line[f"token_{name}"]]
            np.testing.assert_allclose(sums, line[name], atol=1e-4)
        for ids, logps, count, text in zip(
            line["token_ids"], line["token_logps"], line["tokens"], line["responses"],
            strict=True,
        ):  # fmt: skip
            assert len(ids) == len(logps) == count
            assert tiny_text(ids) == text.removeprefix("Ok")


def tiny_text(ids):
    """What the byte tokenizer makes of ids; ends are not shown."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

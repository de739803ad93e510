"""The first rows of a config's data, as the model gets them."""

import json
import re

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from alignax.batch import Example
from alignax.inputs import detokenize
from alignax.text import tokenizer, tokenizer_files
from alignax.training import build, show


def lines(text):
    return [line.strip() for line in text.splitlines()]


@pytest.fixture
def data(tmp_path):
    """A config over rows that a test writes."""

    def make(rows, **changes):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        spec = {"name": "jsonl", "path": str(path), "split": "train"}
        return tiny.config("pairs", data=spec, length=24, buckets=(), **changes)

    return make


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_what_is_scored_is_marked_and_a_cut_says_why(data):
    config = data(
        [
            pair("ab", "cd", "e"),
            pair("0123456789", "x" * 15, "y"),
            pair("abc", "z" * 30, "w"),
        ]
    )
    text = lines(show.show(config))
    assert "prompt: 2 tokens" in text
    assert "⟦cd<eos>⟧" in text
    assert "response 0: 3 tokens, 3 scored, feedback 1" in text
    assert "response 1: 2 tokens, 2 scored, feedback 0" in text
    assert "prompt: 10 tokens" in text
    cut = "response 0: 14 tokens, 14 scored, feedback 1; the last 2 of 16 were cut: length=24"
    assert cut in text
    assert f"⟦{'x' * 14}⟧" in text  # its EOS is gone
    assert f"⟦{'z' * 21}⟧" in text


def test_the_rows_are_those_of_the_batches(tmp_path):
    config = tiny.config("pairs", length=64, buckets=(64,))
    run = build.build(config, str(tmp_path / "run"))
    shown = show.show(config, 32)
    for at in range(3):
        batch = run.source.next(None, at)
        for row, name in enumerate(run.source.report()["ids"]):
            described = detokenize.describe(batch, run.tokenizer, row).splitlines()
            assert f"] {name}\n" in shown
            for response in described[1::2]:  # below a line of numbers each
                prompt, scored = response.split("⟦")
                assert prompt in shown
                assert f"⟦{scored}" in shown


def test_what_is_left_out_is_said_with_its_reason(data):
    config = data([pair("a", "b", "c"), pair("a", "b", ""), {"prompt": "x"}])
    shown = show.show(config)
    assert "rows.jsonl:3" in shown
    assert "left out" in shown


def test_a_response_without_room_is_shown_as_dropped():
    given = {"role": "assistant", "content": "p" * 40, "prefill": "p" * 39}
    example = Example("0", "q", ([given], "no"))
    text = tokenizer.load("bytes")
    shown = show.section("data", [example], text, 1, (show.with_responses, 24))
    assert "  dropped: no room for a scored token at length 24" in shown


def test_rollouts_show_prompts_cut_as_they_are_sampled_from(data):
    config = data([pair("0123456789" * 3, "a", "b")])
    config.truncate_prompts = "left"
    config.rollout.reward = {"name": "constraints", "pattern": "a"}
    config.rollout.max_new = 10
    config.loss, config.shaping = {"name": "policy_gradient"}, {"rloo": {}}
    shown = show.show(config)
    why = "config.length less rollout.max_new leaves 14"
    assert f"prompt: 14 tokens; 16 of 30 were cut: {why}" in shown
    assert "response" not in shown
    config.truncate_prompts = "drop"
    assert (
        "dropped: the prompt has 30 tokens, there is room for 14 (config.truncate_prompts"
        in show.show(config)
    )
    config.rollout.max_new = 24
    with pytest.raises(ValueError, match="leaves no room"):
        show.show(config)


def test_a_stage_reads_by_the_tokenizer_of_the_stage_it_starts_from():
    first, second, third = (tiny.config("sft") for _ in range(3))
    second.tokenizer = third.tokenizer = ""
    second.model.path, third.model.path = "stage:first", "stage:second"
    stages = {"first": first, "second": second, "third": third}
    shown = show.show(ConfigDict({"stages": stages}), 1)
    assert re.findall(r"^== (\w+) ==$", shown, re.M) == ["first", "second", "third"]
    assert shown.count("tokenizer bytes") == 3
    assert shown.count("[0]") == 3


def test_evaluation_data_of_prompts_alone_is_shown_as_prompts():
    data = {"name": "synthetic", "split": "test", "kind": "prompts", "size": 4}
    config = tiny.config("sft", eval_data=data)
    shown = show.show(config, 2).partition("eval_data: 4 examples")[2]
    assert shown.count("prompt: ") == 2
    assert "malformed" not in shown


def test_every_section_is_shown():
    one = tiny.config("sft", eval_data={"name": "synthetic", "split": "test"})
    shown = show.show(one, 1)
    assert [x for x in ("data: 32", "eval_data: ") if f"\n{x}" in shown] == [
        "data: 32", "eval_data: ",
    ]  # fmt: skip
    assert shown.count("[0]") == 2


def test_no_weights_are_read(data, tmp_path):
    """The folder of the model has a tokenizer and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in tokenizer_files.files(tokenizer.load("bytes")).items():
        (folder / name).write_bytes(content)
    config = data([pair("ab", "cd", "e")], tokenizer="")
    config.model.path = str(folder)
    assert "⟦cd<eos>⟧" in show.show(config)


def test_what_cannot_be_shown_is_refused(data):
    config = data([pair("ab", "cd", "e")])
    with pytest.raises(ValueError, match="rows is 0"):
        show.show(config, 0)
    config.data = {"path": "x"}
    with pytest.raises(ValueError, match=r"config\.data has no 'name'"):
        show.show(config)


def test_marks_stand_around_runs_of_scored_tokens():
    text = tokenizer.load("bytes")
    ids, mask = [*"aéb".encode()], [False, True, True, False]
    assert detokenize.marked(ids, mask, text) == "a⟦é⟧b"
    assert detokenize.marked(np.array(ids), np.ones(4, bool), text) == "⟦aéb⟧"
    assert detokenize.marked([], [], text) == ""


def test_reasons_of_all_rows_are_written_to_a_file(data, tmp_path):
    config = data(
        [
            pair("ab", "cd", "e"), pair("abc", "z" * 30, "w"), pair("a", "b", ""),
            pair("u" * 40, "y" * 9, "z"),
        ]
    )  # fmt: skip
    file = tmp_path / "reasons.jsonl"
    shown = show.show(config, 1, str(file))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {(row["id"].split(":")[-1], row["kind"]) for row in found}
    assert {("2", "cut_response"), ("4", "cut_prompt")} <= kinds
    assert any(
        row["kind"] == "malformed" and "rows.jsonl:3" in row["id"] for row in found
    )
    assert all(row["section"] == "data" and row["reason"] for row in found)
    assert f"{len(found)} reasons are in {file}" in shown
    assert "data: 4 read, 3 used, 2 cut" in shown
    assert "1 with a shorter prompt" in shown

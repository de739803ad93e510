"""What a guide reads from a config: another prompt, or the model's own first layers."""

import json

import numpy as np
import pytest
import tiny

from alignax.batch import Example
from alignax.models import transformer
from alignax.respond import respond, starts
from alignax.sampling import continuous, drafts
from alignax.text import tokenizer

SYSTEM = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say a word"},
]
ROWS = [
    {"prompt": "Context: tea. Which drink?", "plain": "Which drink?"},
    {"prompt": "Context: a cat. Which animal is it, please?", "plain": "Which animal?"},
]


def config(folder, rows, guide_prompt="", amateur="target", **changes):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"generate.guide_prompt": guide_prompt, **changes}
    c = tiny.to_respond(folder, **changes)
    c.prompts = {"name": "prompts", "path": str(path), "size": 0}
    c.decoder = {
        "name": "contrastive", "amateur": amateur, "plausible": 0.0, "weight": 0.5,
    }  # fmt: skip
    return c


@pytest.fixture
def handed(monkeypatch):
    """What `continuous.generate` gets for each prompt: {index: ids that its guide reads}."""
    found, generate = {}, continuous.generate

    def spy(lm, prompts, key, *, own, **settings):
        found["guide"] = settings["guide"]
        for i in range(len(prompts)):
            mine = own([i])
            if "guide_prompts" in mine:
                size = int(mine["guide_lengths"][0])
                found[i] = bytes(mine["guide_prompts"][0][:size].tolist()).decode()
        return generate(lm, prompts, key, own=own, **settings)

    monkeypatch.setattr(continuous, "generate", spy)
    return found


@pytest.mark.parametrize(
    ("how", "rows", "want"),
    [
        ("column:plain", ROWS, ["Which drink?", "Which animal?"]),
        ("text:Speak", ROWS, ["Speak", "Speak"]),
    ],
)
def test_the_guide_gets_its_own_prompt(tmp_path, handed, how, rows, want):
    assert respond.respond(config(tmp_path, rows, how), str(tmp_path / "run"))
    assert [handed[i] for i in range(len(rows))] == want
    other = [dict(row, plain="Else?") for row in rows]
    c = config(tmp_path, other, "text:Speak up" if how.startswith("text") else how)
    with pytest.raises(
        ValueError, match=r"settings of rows|holds a run of another config"
    ):
        respond.respond(c, str(tmp_path / "run"))


def test_a_prefill_is_behind_both_prompts(tmp_path, handed):
    c = config(tmp_path, ROWS, "column:plain", **{"generate.prefill": " It is"})
    assert respond.respond(c, str(tmp_path / "run"))
    assert handed[0] == "Which drink? It is"


def test_the_first_layers_are_an_amateur(tmp_path, handed, monkeypatch):
    made, some = [], drafts.some_layers
    monkeypatch.setattr(
        drafts,
        "some_layers",
        lambda lm, keep: made.append(list(keep)) or some(lm, keep),
    )
    c = config(tmp_path, ROWS, amateur="layers:1")
    assert respond.respond(c, str(tmp_path / "run"))
    assert made == [[0]]
    (amateur,) = handed["guide"].init.args[0]
    assert amateur.config.num_layers == 1
    assert transformer.num_params(amateur.params) > 0
    c = config(tmp_path, ROWS, amateur="layers:9")
    with pytest.raises(ValueError, match=r"expected layers of 0..\d"):
        respond.respond(c, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("how", "rows", "told"),
    [
        ("no_system", ROWS, r"prompts.jsonl:1: .*prompt has no system message"),
        ("column:context", ROWS, r"the row's 'context' is None, expected a text"),
        ("column:", ROWS, r"is 'column:', expected 'no_system', 'column:NAME' or"),
        ("unconditional", ROWS, r"is 'unconditional', expected 'no_system'"),
        (
            "text:" + "x" * 2000,
            ROWS,
            r"2 of 2 guide prompts have more than the \d+ tok",
        ),
    ],
)
def test_a_prompt_that_there_is_not_is_named(tmp_path, how, rows, told):
    with pytest.raises(ValueError, match=told):
        respond.check(config(tmp_path, rows, how))


@pytest.mark.parametrize("name", ["", "best_of_n"])
def test_without_a_guide_nobody_reads_it(tmp_path, name):
    c = config(tmp_path, ROWS, "text:Speak")
    c.decoder = {"name": name}
    with pytest.raises(ValueError, match=rf"what a guide reads: .*is '{name}'"):
        respond.check(c)


def test_the_system_message_is_left_out():
    text = tokenizer.load("bytes")
    example = Example("a", SYSTEM, [])
    got = text.decode(starts.guide_prompt(text, example, "no_system", ""))
    assert "Be brief." not in got
    assert "Say a word" in got
    assert "Be brief." in text.decode(text.prompt(example))


def test_different_prompts_change_the_distribution(tmp_path):
    """The log-probability of the sampled distribution differs from the policy's."""
    c = config(tmp_path, ROWS, "column:plain")
    c.decoder.weight = 3.0
    assert respond.respond(c, str(tmp_path / "run"))
    for x in (tmp_path / "run" / respond.NAME).read_text().splitlines():
        line = json.loads(x)
        assert not np.allclose(line["logps"], line["law_logps"], atol=1e-3)

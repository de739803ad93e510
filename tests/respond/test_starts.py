"""A prompt and the beginning of its responses are encoded as one text."""

import json
import pathlib

import numpy as np
import pytest
import tiny

from alignax.batch import Example, from_groups
from alignax.respond import output, respond, starts
from alignax.text import tokenizer

pytestmark = pytest.mark.slow

BYTES = tokenizer.load("bytes")
CHAT = [{"role": "user", "content": "Hi there"}]
FAMILIES = sorted(p.stem for p in (tiny.ROOT / "tests/golden/templates").glob("*.zip"))
BEGINNINGS = ("Sure", " there", "\nThe answer", "  two", "é✓", "<think>\nWhy")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return lambda name: tokenizer.load(tiny.family(name, folder))


def example(prompt):
    return Example("", prompt, ())


def raw(text):
    return text.read_as(text.reading._replace(raw=True))


# -- ids


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_beginning_are_encoded_as_one_text(family, load):
    text = load(family)
    shown = text.render(CHAT, add_generation_prompt=True)
    for prefill in ("", *BEGINNINGS):
        for forced in ("", *BEGINNINGS):
            got = starts.start(text, example(CHAT), prefill, forced)
            want = text.encode(shown + prefill + forced)
            assert [*got.prompt, *got.prefill, *got.forced] == want, (prefill, forced)
            assert got.prompt
            assert bool(got.prefill) >= (bool(prefill) and not forced)
            assert bool(got.forced) == bool(forced)


@pytest.mark.parametrize("family", ["llama2", "mistral", "chatml", "llama3"])
@pytest.mark.parametrize("prompt", ["Answer: ", "Answer:", "One\n", "1 2"])
def test_strings_without_a_template_too(family, prompt, load):
    text = raw(load(family))
    for prefill, forced in (("four", ""), (" four", ""), ("4", " on"), ("\n\n", "no")):
        got = starts.start(text, example(prompt), prefill, forced)
        ids = [*got.prompt, *got.prefill, *got.forced]
        begin = text.prompt(prompt)[: 1 if text.add_bos else 0]
        assert ids == begin + text.encode(prompt + prefill + forced)


def test_where_nothing_straddles_byte_level_ids_are_those_of_the_parts(load):
    text = load("llama3")
    got = starts.start(text, example(CHAT), "Sure", " there")
    assert got.prompt == text.prompt(CHAT)
    assert got.prefill == text.encode("Sure")
    assert got.forced == text.encode(" there")


def test_sentencepiece_adds_no_blank_between(load):
    text = raw(load("llama2"))
    apart = text.prompt("Answer:") + text.encode("four")
    got = starts.start(text, example("Answer:"), "four")
    assert text.decode(apart) == "Answer: four"
    assert text.decode([*got.prompt, *got.prefill]) == "Answer:four"


def test_a_begun_assistant_turn_is_continued(load):
    text = load("chatml")
    begun = [*CHAT, {"role": "assistant", "content": "Sure, the"}]
    once = starts.start(text, example(CHAT), "Sure, the answer")
    twice = starts.start(text, example(begun), " answer")
    assert once.prompt + once.prefill == twice.prompt + twice.prefill
    assert starts.start(text, example(begun)).prompt == text.prompt(begun)
    parts = [
        *CHAT,
        {"role": "assistant", "content": [{"type": "text", "text": "Sure"}]},
    ]
    assert text.prompt(parts) == text.prompt(CHAT, "Sure")


def test_users_control_tokens_stay_text_beside_a_prefill(load):
    text = load("chatml")
    said = [{"role": "user", "content": "<|im_end|> what is this?"}]
    got = starts.start(text, example(said), "A token")
    assert got.prompt == text.prompt(said)
    assert got.prompt.count(text.hidden["<|im_end|>"]) == 1
    assert got.prefill == text.encode("A token")


def test_ids_of_a_prompt_stay_as_they_are(load):
    text = load("llama2")
    ids = text.encode("Answer:")
    got = starts.start(text, ids, "four", "teen")
    assert got.prompt == ids
    assert text.decode([*ids, *got.prefill]) == "Answer:four"
    assert text.decode([*ids, *got.prefill, *got.forced]) == "Answer:fourteen"
    odd = [5, 300, 7]  # no text has these ids
    got = starts.start(text, odd, "four")
    assert got.prompt == odd
    assert text.decode([*text.encode("a"), *got.prefill]) == "afour"


def test_a_prompt_that_is_part_of_the_first_token_is_refused(load):
    text = raw(load("qwen25"))
    with pytest.raises(ValueError, match=r"part of the first token of '\\nSo'"):
        starts.start(text, example("\n"), "", "\nSo")
    got = starts.start(text, example("\n"), "\nSo")
    assert got.prompt + got.prefill == text.encode("\n\nSo")
    assert len(got.prompt) == 1


def test_arrays_have_one_shape_and_lengths_only_where_they_differ():
    a, b = starts.Start([1], [2, 3], [4]), starts.Start([1], [5], [6, 7])
    got = starts.arrays([b], [a, b])
    assert got["prefill"].tolist() == [[5, 0]]
    assert got["prefill_lengths"].tolist() == [1]
    assert got["forced"].tolist() == [[6, 7]]
    got = starts.arrays([a], [a, b])
    assert got["forced"].tolist() == [[4, -1]]
    assert {*starts.arrays([a], [a])} == {"prefill", "forced"}
    assert starts.arrays([starts.Start([1])], [starts.Start([1])]) == {}


# -- text


@pytest.mark.parametrize("family", ["llama2", "mistral", "chatml", "gemma", "qwen3"])
def test_the_text_of_a_response_begins_with_its_beginning(family, load):
    text = raw(load(family))
    for prompt in ("Answer: ", "Answer:", "th"):
        for prefill, forced in (("four", ""), ("", "four"), (" a", " b"), ("e", "e")):
            rest = " and more"
            start = starts.start(text, example(prompt), prefill, forced)
            front = [*start.prompt, *start.prefill]
            whole = text.prompt(prompt, prefill + forced + rest)
            if whole[: len(front) + len(start.forced)] != front + start.forced:
                continue
            batch = from_groups([front], [[whole[len(front) :]]], length=len(whole) + 2)
            batch = batch._replace(
                tokens=np.asarray(batch.tokens), mask=np.asarray(batch.mask)
            )
            rules = output.Rules(prefill=prefill, forced=forced)
            ((got,),) = output.answers(batch, np.ones((1, 1), bool), text, rules)
            assert got.text == prefill + forced + rest, (prompt, prefill, forced)


# -- a run


@pytest.fixture
def config(tmp_path):
    """A config whose prompts are rows, read with the template of a family."""

    def make(rows, family="chatml", variant="", **changes):
        c = tiny.to_respond(tmp_path, variant, **changes)
        c.tokenizer = str(tiny.family(family, tmp_path))
        path = pathlib.Path(tmp_path / "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        c.prompts.path, c.length, c.model.sizes.max_length = str(path), 512, 512
        return c

    return make


def answered(c, folder):
    assert respond.respond(c, str(folder))
    return [json.loads(x) for x in (folder / respond.NAME).read_text().splitlines()]


def begun(question, answer):
    turns = [{"role": "user", "content": question}]
    return {
        "prompt": [*turns, *[{"role": "assistant", "content": answer}] * bool(answer)]
    }


@pytest.mark.parametrize("way", ["", "ngram", "best_of_n"])
def test_a_run_gives_the_model_one_text(config, tmp_path, way):
    """A token straddles in one of the rows: so do the lengths of the prefills differ."""
    rows = [("Hi there", "I see "), ("Hi there", ""), ("Two?", "")]

    def run(rows, **changes):
        c = config(rows, variant=way * (way == "best_of_n"), **changes)
        c.generate.temperature, c.generate.group = 0.0, 1
        c.generate.draft = way * (way == "ngram")
        return answered(c, tmp_path / str(len(changes))), tokenizer.load(c.tokenizer)

    got, text = run([begun(*r) for r in rows], **{"generate.prefill": "the"})
    want, _ = run([begun(q, a + "the") for q, a in rows])
    for a, b in zip(got, want, strict=True):
        assert a["responses"][0] == "the" + b["responses"][0]
        np.testing.assert_allclose(a["logps"], b["logps"], atol=1e-4)
    sizes = [len(starts.start(text, example(r["prompt"]), "the").prefill) for r in got]
    assert sizes == [1, 2, 2]


def test_forced_text_is_scored_and_straddles_like_a_response(config, tmp_path):
    c = config([{"prompt": CHAT}], **{"generate.forced": "\nThe"})
    (row,) = answered(c, tmp_path / "run")
    assert all(text.startswith("\nThe") for text in row["responses"])
    assert row["tokens"] == [6, 6]


FORCED = {
    "best_of_n": {},
    "best_of_n behind a prefill": {"generate.prefill": "so"},
    "best_of_n of a decoder's settings": {"decoder.sampling": {"top_k": 1}},
    "pine": {"decoder.separator": "##"},
}


@pytest.mark.parametrize("way", FORCED)
def test_searches_of_whole_responses_take_forced_text(config, tmp_path, way):
    """Greedy, so that each prompt has one answer: alone, or from the sampling loop."""
    questions = [("Hi there", "I see "), ("Hi there", ""), ("Two?", "")]
    method = way.split()[0]
    if method == "pine":
        questions = [(f"{q}##a##b {q}##So", a) for q, a in questions]
    rows = [begun(*q) for q in questions]
    # a word of one token behind a blank, and of two without it
    changes = {
        "generate.forced": "the",
        "generate.temperature": 0.0,
        "generate.group": 1,
    }

    def run(name, some, variant, **more):
        c = config(some, variant=variant, **changes, **more)
        assert c.batch_size == 2
        return answered(c, tmp_path / name)

    got = run("all", rows, method, **FORCED[way])
    if method == "pine":
        want = [
            run(f"{i}", [row], "pine", **FORCED[way])[0] for i, row in enumerate(rows)
        ]
    else:
        prefill = {k: v for k, v in FORCED[way].items() if k == "generate.prefill"}
        want = run("plain", rows, "", **prefill)
    front = FORCED[way].get("generate.prefill", "")
    for a, b in zip(got, want, strict=True):
        assert a["responses"] == b["responses"]
        assert a["responses"][0].startswith(front + "the")
        assert a["tokens"] == b["tokens"] == [6]
        np.testing.assert_allclose(a["logps"], b["logps"], atol=1e-4)


@pytest.mark.parametrize("method", ["controlled_blocks", "deal", "rain"])
def test_a_search_that_continues_responses_takes_no_forced_text(
    config, tmp_path, method
):
    c = config([{"prompt": CHAT}], variant=method, **{"generate.forced": "\nThe"})
    c.generate.group = 1
    with pytest.raises(ValueError, match=rf"{method} takes no generate.forced"):
        respond.respond(c, str(tmp_path / "other"))


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_template_variables_of_the_config_and_of_a_row_reach_the_prompt(config):
    rows = [
        {"prompt": CHAT},
        {"prompt": CHAT, "tools": [TOOL]},
        {"prompt": CHAT, "chat_template_kwargs": {"documents": [{"title": "A", "text": "B"}]}},
    ]  # fmt: skip
    c = config(rows, "tools")
    text = tokenizer.load(c.tokenizer)

    def shown():
        return [text.decode(ids, keep_specials=True) for ids in respond.check(c).ids]

    plain, tools, documents = shown()
    assert "weather" in tools
    assert "(1) A: B" in documents
    assert "CONTEXT" not in plain
    c.template = {"documents": [{"title": "C", "text": "D"}]}
    plain, tools, documents = shown()
    assert "(1) C: D" in plain
    assert "(1) C: D" in tools
    assert "weather" in tools
    assert "(1) A: B" in documents


def test_a_changed_variable_of_a_row_is_another_prompt(config, tmp_path):
    answered(config([{"prompt": CHAT, "tools": [TOOL]}], "tools"), tmp_path / "run")
    c = config([{"prompt": CHAT, "tools": [TOOL, TOOL]}], "tools")
    with pytest.raises(ValueError, match=r"answers something else.*prompts"):
        respond.respond(c, str(tmp_path / "run"))


@pytest.mark.parametrize("specials", ["text", "tokens"])
def test_the_section_of_the_prompts_says_how_they_are_read(config, specials):
    said = "a<|im_end|>"
    c = config([{"prompt": said}])
    text = tokenizer.load(c.tokenizer)
    (ids,) = respond.check(c).ids
    assert ids == text.prompt(said)
    with c.unlocked():
        c.prompts.specials = specials
    (ids,) = respond.check(c).ids
    assert ids.count(text.hidden["<|im_end|>"]) == (2 if specials == "tokens" else 1)
    with c.unlocked():
        c.prompts.raw = True
    assert respond.check(c).ids == [text.encode(said)]


SAYS_NOTHING = {
    "a content of None": [{"role": "user", "content": None}],
    "blanks": [{"role": "user", "content": " \n"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " "}]}],
}


@pytest.mark.parametrize("kind", SAYS_NOTHING)
def test_a_prompt_that_says_nothing_is_refused(kind):
    rows = [example("a"), Example("rows.jsonl:2", SAYS_NOTHING[kind], ())]
    with pytest.raises(ValueError, match=r"^rows.jsonl:2: the prompt is empty"):
        respond.tokenized(rows, BYTES, batch_size=2, room=100)


def test_turns_without_text_are_a_prompt(load):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "4"},
    ]
    got = respond.tokenized([example(turns)], load("qwen3"), batch_size=1, room=500)
    assert "<tool_call>" in load("qwen3").decode(got.ids[0], keep_specials=True)


def test_all_prompts_that_cannot_be_used_are_counted_and_the_first_is_named(config):
    system = {"role": "system", "content": "Be brief"}
    rows = [{"prompt": CHAT}, {"prompt": [system, *CHAT], "id": "mine"}]
    rows += [{"prompt": CHAT}, {"prompt": [system, *CHAT]}]
    c = config(rows, "no_system")
    with pytest.raises(ValueError, match=r"^2 of 4 prompts cannot be used; first rows.jsonl:2 \(mine\): .*no system turn"):  # fmt: skip
        respond.check(c)
    c.prompts.size = 2
    with pytest.raises(ValueError, match=r"^rows.jsonl:2 \(mine\): .*no system turn"):
        respond.check(c)

"""Prompts of the user: a line or a row each, and none is skipped."""

import json

import pytest

from alignax.data import prompts
from alignax.text import tokenizer


def test_every_line_is_a_prompt_and_blanks_within_it_stay(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff one \r\ntwo: \nthree".encode())
    got = prompts.examples(path=str(path))
    assert [e.prompt for e in got] == [" one ", "two: ", "three"]
    assert [e.id for e in got] == ["p.txt:1", "p.txt:2", "p.txt:3"]
    assert [e.prompt for e in prompts.examples(path=str(path), size=2)] == [" one ", "two: "]  # fmt: skip


@pytest.mark.parametrize(
    "data, message",
    [(b"a\n\nb\n", r"p.txt:2: the prompt is empty"), (b"", "has no prompt"),
     (b"a\n  \n", "p.txt:2: the prompt is empty"), (b"\xff\n", "not UTF-8")],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_an_error(tmp_path, data, message):
    path = tmp_path / "p.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prompts.examples(path=str(path))


@pytest.mark.parametrize(
    "wrong, message",
    [({"split": "test"}, "split is 'test'"), ({"size": -1}, "size is -1"),
     ({"path": ""}, "path is empty")],
)  # fmt: skip
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        prompts.examples(**{"path": "p.txt", **wrong})


def test_a_file_that_is_not_there_is_named_with_its_neighbours(tmp_path):
    (tmp_path / "other.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"p.txt; files beside it.*other.txt"):
        prompts.examples(path=str(tmp_path / "p.txt"))


def test_messages_become_a_chat_and_an_id_is_kept(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]  # fmt: skip
    rows = [{"id": "first", "prompt": turns}, {"prompt": "Plain"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = prompts.examples(path=str(path))
    assert [e.id for e in got] == ["first", "p.jsonl:2"]
    assert got[0].prompt == turns
    text = tokenizer.load("bytes")
    want = "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert text.decode(text.prompt(got[0])) == want
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:2: 'prompt' is missing"):
        prompts.examples(path=str(path))

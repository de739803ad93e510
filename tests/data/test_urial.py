"""The URIAL prompt: constant in front of the query, and its stops end an answer."""

import re

import pytest

from alignax.data import urial
from alignax.respond import output
from alignax.sampling import prefill
from alignax.text import tokenizer

TEXT = tokenizer.load("bytes")
SOURCE = {"name": "synthetic", "kind": "prompts", "size": 4}


@pytest.mark.parametrize("shots", urial.SHOTS)
def test_every_query_has_the_same_prefix_and_an_open_answer(shots):
    got = urial.examples(split="test", source=SOURCE, shots=shots)
    head = urial.prefix(shots)
    assert len(got) == 4
    for example in got:
        assert example.prompt.startswith(head)
        rest = example.prompt.removeprefix(head)
        assert re.fullmatch(r"Review the [\w ]+ in \w+:\n```\n\n# Answer:\n```\n", rest)
    whole = got[0].prompt
    assert (
        whole.count("# Query:\n```\n") == whole.count("# Answer:\n```\n") == shots + 1
    )
    # every fence but that of the open answer is closed
    assert whole.count("\n```") == 4 * (shots + 1) - 1


def test_what_the_prompts_share_can_be_read_once():
    ids = [TEXT.prompt(e) for e in urial.examples(split="test", source=SOURCE, shots=1)]
    many = prefill.common(ids)
    assert TEXT.decode(ids[0][:many]).startswith(urial.prefix(1))
    assert many < min(map(len, ids))


def test_more_shots_go_on_where_fewer_stop():
    heads = [urial.prefix(k).removesuffix("\n\n# Query:\n```\n") for k in urial.SHOTS]
    assert heads[1].startswith(heads[0])
    assert heads[2].startswith(heads[1])
    assert len(heads[0]) < len(heads[1]) < len(heads[2])


@pytest.mark.parametrize("stop", urial.STOPS)
def test_an_answer_ends_where_the_next_query_begins(stop):
    answer = "Happy to help!\n```python\nx = 1\n```\nDone."
    ids = TEXT.encode(answer + stop + ":\n```\nAnd")
    assert output.response(ids, True, TEXT, stops=urial.STOPS).text == answer


def test_what_cannot_be_a_query_is_named(tmp_path):
    for shots in (2, 8, -1):
        with pytest.raises(ValueError, match=rf"shots is {shots}, expected one of \(0, 1, 3\)"):  # fmt: skip
            urial.examples(split="test", source=SOURCE, shots=shots)
    path = tmp_path / "p.txt"
    path.write_text("What does ``` do?\n")
    source = {"name": "prompts", "path": str(path)}
    with pytest.raises(ValueError, match=r"p.txt:1: the query holds ```"):
        urial.examples(split="all", source=source)
    chat = tmp_path / "p.jsonl"
    chat.write_text('{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:1: urial needs prompts in one string"):  # fmt: skip
        urial.examples(split="all", source={"name": "prompts", "path": str(chat)})

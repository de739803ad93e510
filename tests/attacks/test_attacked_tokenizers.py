"""Damaged and hostile tokenizers and chat templates: refused in one line, in bounded time."""

import datetime
import json
import pathlib
import time

import pytest
import tiny
import tokenizers
from tokenizers import models, pre_tokenizers

from alignax.text import chat_template, gguf_vocab, template_limits, tokenizer

NOW = datetime.datetime(2026, 1, 2)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def folder(tmp_path):
    """The folder of a small byte-level tokenizer that can be read."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<eos>"])
    path = tmp_path / "tokenizer"
    path.mkdir()
    core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    assert tokenizer.load(path).eos_ids == {256}
    return path


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.load(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', "[" * 100_000,
             '{"model": {"vocab": {"a": "x"}}}', '{"model": {}, "added_tokens": 5}', "\x00"],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(folder, text):
    (folder / "tokenizer.json").write_text(text)
    refused(folder, r"tokenizer\.json")


def test_a_file_that_is_cut_anywhere_is_refused(folder):
    path = folder / "tokenizer.json"
    whole = path.read_text()
    for size in range(0, len(whole) - 2, len(whole) // 40):
        path.write_text(whole[:size])
        refused(folder, r"tokenizer\.json")


@pytest.mark.parametrize("where", ["vocab", "added"])
@pytest.mark.parametrize("value", [2**31, 2**24, -1, 1.5, "3", None, True])
def test_an_id_that_no_table_has_room_for_is_refused(folder, where, value):
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text())
    if where == "vocab":
        made["model"]["vocab"]["!"] = value
    else:
        made["added_tokens"][0]["id"] = value
    path.write_text(json.dumps(made))
    refused(folder, r"tokenizer\.json: an id of (vocab|added_tokens) is")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-5, "x", [1, None], 1.5, True, {}])
def test_an_eos_that_is_no_id_is_refused(folder, name, value):
    (folder / name).write_text(json.dumps({"eos_token_id": value}))
    refused(folder, rf"{name}: eos_token_id is")


def test_an_eos_that_no_token_has_is_left_out_and_said(folder, caplog):
    (folder / "config.json").write_text('{"eos_token_id": [1000000000, 256]}')
    assert tokenizer.load(folder).eos_ids == {256}
    assert "no token has the EOS ids [1000000000]" in caplog.text
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer.load(folder).eos_id == 256
    (folder / "config.json").write_text('{"eos_token_id": 1000000000}')
    refused(folder, "no EOS token")


@pytest.mark.parametrize(
    "settings", [{"eos_token": 3}, {"eos_token": "\ud800"}, {"eos_token": "x" * 9999}, {"eos_token": ["x"]}, {"eos_token": "<no>"}, {"eos_token": {"content": 3}},
                 {"eos_token": "<eos>", "chat_template": 3}, {"eos_token": "<eos>", "chat_template": {"a": "b"}}],
)  # fmt: skip
def test_settings_of_another_type_are_refused(folder, settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = refused(folder, "eos_token|chat_template|special tokens|no tokenizer")
    assert len(text) < 500


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])  # fmt: skip
def test_settings_that_are_no_object_are_refused(folder, name, text):
    (folder / name).write_text(text)
    refused(folder, name)


# -- templates


def render(template, turns=TURNS, **variables):
    return chat_template.render(
        template, turns, False, specials={}, now=NOW, variables=variables
    )


HUGE = {
    "power": "{{ 10 ** (10 ** 10) }}",
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ [1] * 10**10 }}",
    "center": "{{ 'x' | center(10**10) }}",
    "method": "{{ 'x'.ljust(10**10) }}",
    "keyword": "{{ 'x' | center(width=10**10) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf of a width": "{{ '%*d' % (1000000000, 1) }}",
    "filter format": "{{ '%1000000000d' | format(1) }}",
    "method format": "{{ '{:>1000000000}'.format(1) }}",
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "filter replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "join": "{{ range(999) | join('x' * 99999) }}",
    "tojson": "{{ {'a': 1} | tojson(indent=10**9) }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "wordwrap": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='y' * 99999) }}",
    "batch": "{{ 'a' | batch(10**10, 'x') | list }}",
    "doubled": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "squared": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "many": "{{ '' ~ " + " ~ ".join(["'x' * 9999999"] * 50) + " }}",
    "output": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
}  # fmt: skip
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
}  # fmt: skip
WRONG = {
    "division": "{{ 1 // 0 }}", "overflow": "{{ 10.0 ** 400 }}", "random": "{{ [1, 2] | random }}",
    "lipsum": "{{ lipsum() }}", "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "syntax": "{% if %}",
    "unsafe": "{{ ''.__class__.__mro__ }}", "include": "{% include 'x' %}",
    "long": "x" * (template_limits.SOURCE + 1), "range": "{{ range(10**9) }}",
    "key": "{{ messages['x'].y.z }}", "digits": "{{ '9' * 5000 | int }}{{ 10 ** 2000 ** 2 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", [*HUGE, *WRONG])
def test_a_template_that_computes_too_much_is_refused(name):
    begun = time.thread_time()
    with pytest.raises(ValueError, match="chat template refuses") as caught:
        render({**HUGE, **WRONG}[name])
    assert "\n" not in str(caught.value)
    assert time.thread_time() - begun < 10


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(monkeypatch, name):
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"takes longer than 0\.5 seconds"):
        render(ENDLESS[name])


def test_what_conversations_need_is_within_the_limits():
    turns = [{"role": "user", "content": "word " * 1000}] * 20
    out = render("{% for m in messages %}{{ m.content | trim | replace('word', 'verb') }}\n{% endfor %}", turns)  # fmt: skip
    assert len(out) > 90_000
    template = "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content[:9] %}{% endfor %}{{ n.x * 2 }}"  # fmt: skip
    assert render(template, turns) == "word word" * 40
    assert render("{{ x | default(1700000000) }} {{ y | int + 1 }}", y=1700000000) == "1700000000 1700000001"  # fmt: skip
    assert render("{{ tools | tojson(indent=4) }}", tools=[{"a": [1, 2]}]).count("\n") == 7  # fmt: skip


@pytest.mark.parametrize("family", ["gemma", "chatml"])
def test_a_hostile_template_of_a_folder_is_refused_or_refuses_its_rows(
    tmp_path, family
):
    folder = tiny.family(family, tmp_path)
    for path in folder.glob("chat_template.jinja"):
        path.unlink()
    there = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("nesting", "random", "syntax", "long"):
        text = json.dumps({**there, "chat_template": WRONG[name]})
        (folder / "tokenizer_config.json").write_text(text)
        refused(folder, "the chat template cannot be read")
    text = json.dumps({**there, "chat_template": HUGE["power"]})
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"chat template refuses"):
        tokenizer.load(folder).prompt("hello")


@pytest.mark.parametrize(
    "form", ["**%s**", "* %s", "<|x_20240101|> %s", "%s 100000", "%5s", "%-3.2s"]
)
def test_a_format_string_of_a_template_may_hold_stars_and_dates(form):
    template_limits.formatted(form)
    template_limits.formatted(form.replace("%s", "{}"))


@pytest.mark.parametrize(
    "form",
    [
        "%1000000d",
        "%*d",
        "%.1000000f",
        "%.*f",
        "{:>1000000}",
        "{:{}}",
        "{x:0999999}",
        "%(a)1000000s",
    ],
)
def test_a_field_of_a_large_or_computed_width_is_refused(form):
    with pytest.raises(template_limits.TooMuch, match="large width"):
        template_limits.formatted("* " + form)


# -- .gguf files name ids that no token has: some converters write them


@pytest.mark.parametrize("field", ["padding_token_id", "eot_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [-1, 384, 2**32 - 1])
def test_an_id_of_a_gguf_file_that_no_token_has_is_left_out(caplog, field, value):
    tokens = [chr(33 + i) for i in range(90)]
    ggml = {"tokens": tokens, "merges": ["! !"], "eos_token_id": 3, field: value}
    gguf_vocab._check(ggml, None, pathlib.Path("model.gguf"))
    assert ggml[field] is None and ggml["eos_token_id"] == 3
    assert (
        f"model.gguf: tokenizer.ggml.{field} is {value}, which no token" in caplog.text
    )
    for wrong in ("x", 1.5, True, 2**40):
        with pytest.raises(
            ValueError, match=rf"model\.gguf: tokenizer\.ggml\.{field} is"
        ):
            gguf_vocab._check({**ggml, field: wrong}, None, pathlib.Path("model.gguf"))

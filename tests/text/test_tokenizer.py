"""The tokenizer: ids of a conversation, and where its mask is True."""

import datetime
import json
import os

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from alignax.batch import Example
from alignax.text import tokenizer

NOW = datetime.datetime(2026, 1, 2)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# '</s>' is 1, '<|im_end|>' is 3


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def directory(
    path, *, template=None, eos="<|im_end|>", config=None, post=False, **files
):
    """A Hugging Face directory with a byte-level vocabulary and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocab = {t: i for i, t in enumerate((*SPECIALS, *letters, *map("".join, merges)))}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    if post:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    path.mkdir(exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": eos},
        "chat_template": template,
    }
    settings |= config or {}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def chat(tmp_path):
    return tokenizer.load(directory(tmp_path / "chat", template=CHATML), now=NOW)


@pytest.fixture
def raw():
    return tokenizer.load("bytes", now=NOW)


def scored_text(tk, t, g=0):
    """The runs of scored tokens, as text."""
    runs, run = [], []
    for i, s in zip([*t.responses[g], 0], [*t.scored[g], False], strict=True):
        if s:
            run.append(i)
        elif run:
            runs.append(tk.decode(run, keep_specials=True))
            run = []
    return runs


# -- bytes


def test_bytes_are_their_own_ids_and_specials_lie_beyond_them(raw):
    assert raw.encode("aé") == [97, 0xC3, 0xA9]
    assert raw.vocab_size == 259
    assert raw.eos_ids == {257}
    assert min(raw.eos_id, raw.bos_id, raw.pad_id) > 255
    assert raw.encode("<eos>") == list(b"<eos>")


def test_decode_drops_specials_unless_they_are_wanted(raw):
    ids = [raw.bos_id, 104, 105, raw.eos_id, raw.pad_id]
    assert raw.decode(ids) == "hi"
    assert raw.decode(ids, keep_specials=True) == "<bos>hi<eos><pad>"


def test_raw_text_gets_one_eos_per_response_and_no_template(raw):
    t = raw.tokenize(Example("x", "ab", ["c", "de"]))
    assert t == ([97, 98], [[99, 257], [100, 101, 257]], [[True] * 2, [True] * 3])


def test_an_empty_raw_prompt_becomes_bos(raw):
    assert raw.tokenize(Example("x", "", ["c"])).prompt_ids == [raw.bos_id]


def test_messages_without_a_template_close_every_assistant_turn_once(raw):
    example = Example("x", [user("a")], [[assistant("b"), user("c"), assistant("d")]])
    t = raw.tokenize(example)
    whole = raw.decode(t.prompt_ids + t.responses[0], keep_specials=True)
    assert whole == "User: a\n\nAssistant: b<eos>\n\nUser: c\n\nAssistant: d<eos>"
    assert scored_text(raw, t) == [" b<eos>", " d<eos>"]


def test_the_history_that_is_generated_from_is_the_one_trained_on(raw, chat):
    history = [user("a"), assistant("b"), user("c")]
    for tk in (raw, chat):
        t = tk.tokenize(Example("x", history, ["d"]))
        assert tk.prompt(history) == t.prompt_ids
        assert sum(i in tk.eos_ids for i in t.prompt_ids) == (1 if tk is raw else 3)


# -- chat templates


def test_template_is_rendered_to_one_string_and_tokenised_once(chat):
    t = chat.tokenize(Example("x", [user("hi")], [[assistant("the")]]))
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render([user("hi")], add_generation_prompt=True) == text
    assert t.prompt_ids == chat.encode(text)
    assert t.prompt_ids + t.responses[0] == chat.encode(text + "the<|im_end|>")
    assert 0 not in t.prompt_ids  # no BOS beside what the template wrote


def test_strings_are_one_user_and_one_assistant_turn(chat):
    messages = chat.tokenize(Example("x", [user("hi")], [[assistant("ok")]]))
    assert chat.tokenize(Example("x", "hi", ["ok"])) == messages
    assert chat.prompt("hi") == messages.prompt_ids


def test_only_assistant_turns_are_scored_each_with_its_eos(chat):
    response = [assistant("b"), user("c"), assistant("d")]
    t = chat.tokenize(Example("x", [user("a")], [response]))
    assert scored_text(chat, t) == ["b<|im_end|>", "d<|im_end|>"]


def test_newline_after_eos_is_not_scored(chat):
    t = chat.tokenize(Example("x", "a", ["b"]))
    assert t.responses[0][-1] == chat.eos_id
    response = [assistant("b"), user("c"), assistant("d")]
    t = chat.tokenize(Example("x", "a", [response]))
    after = t.responses[0].index(chat.eos_id) + 1
    assert chat.decode(t.responses[0][after : after + 1]) == "\n"
    assert not t.scored[0][after]


def test_eos_is_appended_where_the_template_writes_none(tmp_path):
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tk = tokenizer.load(directory(tmp_path / "m", template=template, eos="</s>"))
    t = tk.tokenize(Example("x", "a", [[assistant("b"), user("c"), assistant("d")]]))
    assert scored_text(tk, t) == ["b</s>", "d</s>"]


def test_eos_is_a_set_and_any_of_it_ends_a_turn(tmp_path):
    path = directory(
        tmp_path / "m", template=CHATML, eos="</s>",
        generation_config={"eos_token_id": [1, 3]},
    )  # fmt: skip
    tk = tokenizer.load(path)
    assert tk.eos_ids == {1, 3}
    t = tk.tokenize(Example("x", "a", ["b"]))
    assert scored_text(tk, t) == ["b<|im_end|>"]  # nothing appended behind it


def test_pad_equal_to_eos_changes_nothing(tmp_path, chat):
    config = {"pad_token": "<|im_end|>"}
    tk = tokenizer.load(directory(tmp_path / "m", template=CHATML, config=config))
    assert tk.pad_id == tk.eos_id
    other = tokenizer.load(
        directory(tmp_path / "n", template=CHATML, config={"pad_token": "<s>"})
    )
    assert other.pad_id != other.eos_id
    example = Example("x", "a", ["b", "c"])
    assert tk.tokenize(example) == other.tokenize(example)


def test_a_bos_that_the_template_writes_is_the_only_one(tmp_path):
    tk = tokenizer.load(
        directory(tmp_path / "m", template="{{ bos_token }}" + CHATML, post=True)
    )
    assert tk.add_bos  # the tokenizer would add one to raw text
    ids = tk.prompt([user("a")])
    assert ids[0] == tk.bos_id
    assert ids.count(tk.bos_id) == 1


def test_raw_text_starts_with_one_bos_where_the_tokenizer_adds_it(tmp_path):
    tk = tokenizer.load(directory(tmp_path / "m", post=True))
    assert tk.prompt("ab") == [0, *tk.encode("ab")]
    assert tk.prompt("<s>ab") == [0, *tk.encode("ab")]
    assert tk.encode("ab")[0] != 0


def test_two_bos_are_an_error(tmp_path):
    template = "{{ bos_token }}" + CHATML.replace(
        "'<|im_start|>' + m.role", "m.content"
    )
    tk = tokenizer.load(directory(tmp_path / "m", template=template))
    assert tk.prompt([user("<s>a")]).count(tk.bos_id) == 1  # a user's '<s>' is text
    tk = tk.read_as(tk.reading._replace(specials="tokens"))
    with pytest.raises(ValueError, match="two BOS"):
        tk.prompt([user("<s>a")])


def test_a_prompt_that_differs_from_the_dialogue_is_counted_with_a_window(tmp_path):
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    tk = tokenizer.load(directory(tmp_path / "m", template=template))
    example = Example("x", "question", ["answer"])
    got = tk.dialogues.ids(tk.dialogues.render(example))
    head = tk.encode("<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n")
    assert f"from token {len(head)} on" in got.notes["prompt_differs"]
    assert got.prompt == head  # of the dialogue itself
    assert scored_text(tk, tk.tokenize(example)) == ["answer<|im_end|>"]
    assert tk.decode(tk.prompt(example)).endswith("<think>")  # to generate from


@pytest.mark.parametrize(
    ("content", "lost"), [("\n\nb", 1), ("\nb", 0), ("\n\n\nb", 1)]
)
def test_a_token_that_straddles_prompt_and_response_is_scored(chat, content, lost):
    """The line break of the header and the first one of the content are one token."""
    example = Example("x", "a", [content, "b"])
    t = chat.tokenize(example)
    header = chat.prompt("a")
    assert t.prompt_ids == header[: len(header) - lost]
    for g, response in enumerate([content, "b"]):
        whole = chat.render([user("a"), assistant(response)])
        assert t.prompt_ids + t.responses[g] == chat.encode(whole)[:-1]
        assert all(t.scored[g])  # both sides from the same place on


def test_a_straddling_token_of_a_later_turn_is_scored(chat):
    response = [assistant("b"), user("c"), assistant("\n\nd")]
    t = chat.tokenize(Example("x", "a", [response]))
    assert scored_text(chat, t) == ["b<|im_end|>", "\n\n\nd<|im_end|>"]


def test_strings_without_a_template_are_tokenised_as_one_text(tmp_path):
    tk = tokenizer.load(directory(tmp_path / "m"))
    t = tk.tokenize(Example("x", "a t", ["he", "b"]))
    assert t.prompt_ids == tk.encode("a")  # " the" is one token
    assert t.responses[0] == [*tk.encode(" the"), tk.eos_id]
    assert t.responses[1] == [*tk.encode(" tb"), tk.eos_id]
    assert t.scored == [[True] * 2, [True] * 4]
    assert tk.prompt("a t") == tk.encode("a t")


def test_response_that_holds_eos_is_an_error(chat):
    with pytest.raises(ValueError, match="2 EOS"):
        chat.tokenize(Example("x", "a", ["b<|im_end|>c"]))


def test_response_without_an_assistant_turn_is_an_error(chat, raw):
    for tk in (chat, raw):
        for prompt in ([user("a")], [user("a"), assistant("b")]):
            with pytest.raises(ValueError, match="no assistant turn"):
                tk.tokenize(Example("x", prompt, [[user("c")]]))


def test_old_turns_of_a_prompt_may_be_rendered_differently(tmp_path):
    # Qwen3's way: thoughts are kept in the last turn only.
    template = CHATML.replace(
        "m.content }}", "(m.content if loop.last else m.content.split('|')[-1]) }}"
    )
    tk = tokenizer.load(directory(tmp_path / "m", template=template))
    history = [user("a"), assistant("thought|b"), user("c")]
    t = tk.tokenize(Example("x", history, ["why|d"]))
    assert scored_text(tk, t) == ["why|d<|im_end|>"]
    assert "thought" not in tk.decode(t.prompt_ids)


def test_templates_see_what_hugging_face_gives_them(tmp_path):
    template = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if loop.first %}{% continue %}{% endif %}{{ eos_token }}{% endfor %}"
        "{{ strftime_now('%Y-%m-%d') }}{% if tools is none %}!{% endif %}"
    )
    tk = tokenizer.load(directory(tmp_path / "m", template=template), now=NOW)
    text = tk.render([user("<é>"), assistant("b")])
    assert text == (
        '{"role": "user", "content": "<é>"}{"role": "assistant", "content": "b"}'
        "<|im_end|>2026-01-02!"
    )


def test_template_that_refuses_speaks_for_itself(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tk = tokenizer.load(directory(tmp_path / "m", template=template))
    with pytest.raises(ValueError, match=r"\['user'\].*roles must alternate"):
        tk.render([user("a")])


def test_templates_run_in_a_sandbox(tmp_path):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tk = tokenizer.load(directory(tmp_path / "m", template=template))
    with pytest.raises(ValueError, match="unsafe"):
        tk.render([user("a")])


def test_fingerprint_changes_with_template_and_vocabulary(tmp_path, chat):
    same = tokenizer.load(directory(tmp_path / "a", template=CHATML))
    other = tokenizer.load(directory(tmp_path / "b", template=CHATML + " "))
    file = directory(tmp_path / "c", template=CHATML) / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"the": ', '"thé": ').replace("Ġ the", "Ġ th")
    )
    assert chat.fingerprint == same.fingerprint
    assert chat.fingerprint != other.fingerprint
    assert tokenizer.load("bytes").fingerprint != chat.fingerprint


# -- loading


def test_jinja_file_wins_over_the_template_in_the_config(tmp_path):
    path = directory(tmp_path / "m", template="old")
    (path / "chat_template.jinja").write_text(CHATML)
    assert tokenizer.load(path).chat_template == CHATML


def test_missing_tokenizer_names_what_is_there(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*model\.safetensors"):
        tokenizer.load(tmp_path)


def test_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no EOS"):
        tokenizer.load(directory(tmp_path / "m", config={"eos_token": None}))


def test_special_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="<nope>"):
        tokenizer.load(directory(tmp_path / "m", eos="<nope>"))


# -- GGUF


def ggml(**changes):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ċ Ċ", "1 2", "12 3", "Ġ a"]
    tokens = [
        "<bos>",
        "<eos>",
        "<tool>",
        *letters,
        *(m.replace(" ", "") for m in merges),
    ]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    fields = dict(
        model="gpt2", pre="smollm", tokens=tokens, merges=merges, token_type=types,
        bos_token_id=0, eos_token_id=1, padding_token_id=1,
    )  # fmt: skip
    return fields | changes


def pieces(pre, text):
    tk = tokenizer.from_ggml(ggml(pre=pre), None, now=NOW)
    return [tk.decode([i], keep_specials=True) for i in tk.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        # single digits; newlines before a digit are a piece of their own
        ("smollm", ["\n\n", "1", "2", "3", " a"]),
        # GPT-2 leaves the last blank to the word behind it
        ("gpt-2", ["\n", "\n", "123", " a"]),
        ("llama-bpe", ["\n\n", "123", " a"]),
        ("qwen2", ["\n\n", "1", "2", "3", " a"]),
    ],
)
def test_gguf_pre_tokenizer_decides_the_pieces(pre, expected):
    assert pieces(pre, "\n\n123 a") == expected


def test_llama_takes_whole_words_of_the_vocabulary_before_it_merges():
    fields = ggml(pre="llama-bpe")
    fields["tokens"].append("zz")  # no merge makes it
    fields["token_type"].append(1)
    tk = tokenizer.from_ggml(fields, None, now=NOW)
    assert tk.encode("zz") == [len(fields["tokens"]) - 1]
    assert (
        len(tokenizer.from_ggml(fields | {"pre": "qwen2"}, None, now=NOW).encode("zz"))
        == 2
    )


def test_gguf_specials_are_whole_tokens_and_control_tokens_are_not_decoded():
    tk = tokenizer.from_ggml(ggml(), "template", now=NOW)
    assert tk.encode("<bos>a<tool><eos>")[::2] == [0, 2]
    assert tk.decode(tk.encode("<bos>a<tool><eos>")) == "a<tool>"
    assert (tk.bos_id, tk.eos_ids, tk.pad_id, tk.chat_template) == (
        0,
        {1},
        1,
        "template",
    )
    assert not tk.add_bos
    assert tokenizer.from_ggml(ggml(add_bos_token=True), None, now=NOW).add_bos


def test_gguf_turn_end_joins_the_eos_set():
    assert tokenizer.from_ggml(ggml(eot_token_id=2), None, now=NOW).eos_ids == {1, 2}


def test_unknown_pre_tokenizer_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'tekken'.*'smollm'"):
        tokenizer.from_ggml(ggml(pre="tekken"), None, now=NOW)


def test_gguf_vocabulary_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="'llama'"):
        tokenizer.from_ggml(ggml(model="llama"), None, now=NOW)


@pytest.mark.skipif("ALIGNAX_SMOLLM2" not in os.environ, reason="needs ALIGNAX_SMOLLM2")
def test_smollm2_gguf_gives_the_ids_of_the_checkpoint():
    # Made with transformers' tokenizer and the pre-tokenizer of the original checkpoint
    # (single digits, then byte level), which transformers drops when it reads GGUF.
    tk = tokenizer.load(os.environ["ALIGNAX_SMOLLM2"])
    golden = {
        "Hello, world!": [19556, 28, 905, 17],
        "In 2024\n\n1. don't  stop": [
            788, 216, 34, 32, 34, 36, 1116, 33, 30, 1326, 982, 216, 2853,
        ],
        "naïve 日本 🙂\t x": [3546, 46494, 17097, 241, 115, 40993, 47526, 197, 1792],
    }  # fmt: skip
    for text, ids in golden.items():
        assert tk.encode(text) == ids
        assert tk.decode(ids) == text
    chat = [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018,
        411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198,
        10539, 30, 2, 198,
    ]  # fmt: skip
    t = tk.tokenize(Example("x", "Hi", ["Yes."]))
    assert t.prompt_ids + t.responses[0] == chat[:-1]
    assert t.responses[0] == [10539, 30, 2]
    assert (tk.vocab_size, tk.eos_ids, tk.bos_id, tk.pad_id) == (49152, {2}, 1, 2)


# -- prefills


def begun(text, prefill):
    return [[{**assistant(text), "prefill": prefill}]]


def test_a_prefill_is_given_and_not_scored(chat):
    example = Example("p:0", "hi", begun("First no.", "First"))
    t = chat.tokenize(example)
    assert scored_text(chat, t) == [" no.<|im_end|>"]
    assert t.prompt_ids == chat.prompt(example)
    whole = chat.tokenize(Example("p:0", "hi", ["First no."]))
    assert t.responses == whole.responses


def test_a_token_that_a_prefill_begins_is_scored(chat):
    """'the' is one token; half of it cannot be given."""
    t = chat.tokenize(Example("p:0", "hi", begun("the end", "th")))
    assert scored_text(chat, t) == ["the end<|im_end|>"]


def test_a_prefill_that_is_not_the_beginning_is_an_error(chat):
    with pytest.raises(ValueError, match=r"prefill 'no' does not begin 'First no\.'"):
        chat.tokenize(Example("p:0", "hi", begun("First no.", "no")))

"""The methods that lm-evaluation-harness calls, without it, on a small model of bytes."""

import builtins
import dataclasses
import sys
import types

import pytest

import alignax as ax
from alignax.harness import __main__ as command
from alignax.harness import adapter, generation
from alignax.models import transformer

EOS = 257
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def folder(make_lm, tmp_path_factory):
    config = transformer.ModelConfig(
        vocab_size=259, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_width=24, max_length=48, eos_ids=(EOS,),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("harness") / "model"
    ax.save(ax.Model(make_lm(config), ax.tokenizer("bytes")), str(path))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return adapter.Adapter(str(folder), batch_size=4)


@pytest.fixture(scope="module")
def plain(folder):
    return ax.load(str(folder))


def deeper(lm, length):
    """The model with another length of context."""
    return lm._replace(config=dataclasses.replace(lm.config, max_length=length))


def nats(plain, prompt, response):
    """By the public function, of ids."""
    return float(ax.score(plain, [prompt], [response]).logps.sum())


# -- log-likelihoods


def test_loglikelihoods_are_in_the_order_of_the_requests(model, plain):
    pairs = [
        ("ab ", "c"),
        ("a longer context", " x"),
        ("", "yes"),
        ("ab ", "dd"),
        ("é", "ü"),
    ]
    got = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    bos = [256]
    ids = [
        (b"ab", b" c"), (b"a longer context", b" x"), (bos, b"yes"), (b"ab", b" dd"),
        ("é".encode(), "ü".encode()),
    ]  # fmt: skip
    for (total, greedy), (context, continuation) in zip(got, ids, strict=True):
        want = nats(plain, [*context], [*continuation])
        assert total == pytest.approx(want, abs=1e-4)
        assert type(total) is float
        assert type(greedy) is bool


def test_a_context_beyond_the_models_loses_its_beginning(folder, model, plain):
    text = "".join(chr(97 + i % 26) for i in range(100))
    (got,) = model.loglikelihood([request(text, "!?")], disable_tqdm=True)
    ids = [*text.encode()][-47:], [*b"!?"]  # 48 are read
    whole = ax.Model(deeper(plain.lm, 64), plain.tokenizer)
    assert got[0] == pytest.approx(nats(whole, *ids), abs=1e-4)
    short = adapter.Adapter(str(folder), batch_size=1, max_length=8)
    (got,) = short.loglikelihood([request(text, "!?")], disable_tqdm=True)
    assert got[0] == pytest.approx(nats(plain, ids[0][-7:], ids[1]), abs=1e-4)
    with pytest.raises(
        ValueError, match="has 9 tokens, and the context of the model is 8"
    ):
        short.loglikelihood([request("a", "123456789")], disable_tqdm=True)


def test_a_rolling_likelihood_is_the_sum_of_its_windows(folder, plain):
    short = adapter.Adapter(str(folder), batch_size=3, max_length=4)
    texts = ["0123456789", "", "ab"]
    got = short.loglikelihood_rolling([request(t) for t in texts], disable_tqdm=True)
    want = nats(plain, [256], [*b"0123"]) + nats(plain, [*b"3"], [*b"4567"])
    want += nats(plain, [*b"567"], [*b"89"])
    assert got == pytest.approx([want, 0.0, nats(plain, [256], [*b"ab"])], abs=2e-4)


def test_the_bos_and_the_prefix_can_be_chosen(folder, plain):
    chosen = adapter.Adapter(str(folder), add_bos_token=True, prefix_token_id=EOS)
    got = chosen.loglikelihood(
        [request("ab", "c"), request("", "c")], disable_tqdm=True
    )
    want = [nats(plain, [256, *b"ab"], [*b"c"]), nats(plain, [EOS], [*b"c"])]
    assert [total for total, _ in got] == pytest.approx(want, abs=1e-4)


# -- responses


def greedy(plain, prompt, many):
    out = ax.generate(plain, [prompt], max_new=many, temperature=0)
    ids = out.generated.batch.tokens[0, 0][out.generated.batch.mask[0, 0]]
    return plain.tokenizer.decode(ids)


def test_responses_are_greedy_cut_at_stops_and_in_order(model, plain):
    whole = greedy(plain, [*b"Say"], 8)
    stop = whole[3]
    requests = [
        request("Say", {"until": [stop], "max_gen_toks": 8}),
        request("Tell me", {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 1.0}),
        request("Say", {"max_new_tokens": 8}),
        request("Say", {"until": "never", "max_gen_toks": 2}),
    ]  # fmt: skip
    got = model.generate_until(requests, disable_tqdm=True)
    assert got[0] == whole.split(stop)[0]
    assert got[1] == greedy(plain, [*b"Tell me"], 8)
    assert got[2] == whole
    assert got[3] == greedy(plain, [*b"Say"], 2)


def test_a_long_prompt_loses_its_beginning(model, plain):
    text = "x" * 30 + "".join(chr(97 + i % 26) for i in range(60))
    (got,) = model.generate_until(
        [request(text, {"max_gen_toks": 8})], disable_tqdm=True
    )
    assert got == greedy(plain, [*text.encode()][-40:], 8)
    with pytest.raises(ValueError, match="max_gen_toks is 48, expected fewer"):
        model.generate_until([request("a", {"max_gen_toks": 48})])


def test_samples_depend_on_the_place_of_a_request_and_on_the_seed(folder, model):
    given = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    requests = [request("Say", given) for _ in range(6)]
    got = model.generate_until(requests, disable_tqdm=True)
    assert len({*got}) > 1
    assert got == model.generate_until(requests, disable_tqdm=True)
    one_by_one = adapter.Adapter(str(folder), batch_size=1)
    assert got == one_by_one.generate_until(requests, disable_tqdm=True)
    other = adapter.Adapter(str(folder), batch_size=4, seed=1)
    assert got != other.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, generation.Settings((), 256, 0.0)),
        ({"until": ["", "a", "a"]}, generation.Settings(("a",), 256, 0.0)),
        (
            {"repetition_penalty": 1.2, "top_k": 5},
            generation.Settings((), 256, 0.0, (("repetition_penalty", 1.2),)),
        ),
        ({"temperature": 0.7}, generation.Settings((), 256, 0.7)),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, generation.Settings((), 256, 0.0)),
        (
            {"temperature": 1, "do_sample": True, "top_p": 0.9, "num_beams": 1, "max_tokens": 3},
            generation.Settings((), 3, 1.0, (("top_p", 0.9),)),
        ),
    ],
)  # fmt: skip
def test_settings_are_read_as_the_harness_reads_them(given, want):
    assert generation.parse(given) == want


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported; known are until"),
        ({"max_length": 4}, "max_length=4 is not supported"),
        ({"until": 3}, "until is 3"),
        ({"do_sample": True}, "expected a temperature above 0"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
    ],
)
def test_a_setting_that_is_not_supported_is_an_error(given, text):
    with pytest.raises(ValueError, match=text):
        generation.parse(given)


def test_a_text_is_cut_at_the_first_stop():
    assert generation.cut("abcd", ("d", "bc")) == "a"
    assert generation.cut("abcabd", ("abd", "ca")) == "abc"  # they overlap
    assert generation.cut("abc", ()) == "abc"


# -- chat templates


@pytest.fixture(scope="module")
def chat(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return adapter.Adapter(str(path))


USER = {"role": "user", "content": "Hi"}


def test_a_chat_is_rendered_by_the_template(chat):
    assert chat.apply_chat_template([USER]) == "<user>Hi<assistant>"
    begun = [USER, {"role": "assistant", "content": "The answer is"}]
    assert chat.apply_chat_template(begun, False) == "<user>Hi<assistant>The answer is"
    assert chat.chat_template(True) == TEMPLATE
    assert chat.chat_template(False) is None
    with pytest.raises(ValueError, match="name no template"):
        chat.chat_template("rag")


def test_a_template_without_system_turns_gets_none(chat, caplog):
    system = {"role": "system", "content": "Be brief."}
    assert chat.apply_chat_template([system, USER]) == "<user>Hi<assistant>"
    assert "the system turn is left out" in caplog.text


def test_a_model_without_a_template_applies_none(model):
    for ask in (
        lambda: model.chat_template(True),
        lambda: model.apply_chat_template([USER]),
    ):
        with pytest.raises(ValueError, match="has no chat template"):
            ask()


# -- around them


def test_results_reach_the_cache_of_the_harness(folder):
    seen = []
    cached = adapter.Adapter(str(folder))
    cached.cache_hook = types.SimpleNamespace(add_partial=lambda *x: seen.append(x))
    given = {"max_gen_toks": 2}
    a = cached.loglikelihood([request("a", "b")], disable_tqdm=True)
    b = cached.loglikelihood_rolling([request("ab")], disable_tqdm=True)
    c = cached.generate_until([request("a", given)], disable_tqdm=True)
    assert seen == [
        ("loglikelihood", ("a", "b"), a[0]),
        ("loglikelihood_rolling", ("ab",), b[0]),
        ("generate_until", ("a", given), c[0]),
    ]


def test_the_name_of_the_tokenizer_tells_two_apart(model, chat):
    assert model.tokenizer_name.startswith("model__")
    assert model.tokenizer_name != chat.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 49}, "max_length is 49, expected 1 to 48"),
        ({"mesh": "2"}, "three sizes"),
    ],
)
def test_an_argument_out_of_its_range_is_an_error(folder, arguments, text):
    with pytest.raises(ValueError, match=text):
        adapter.Adapter(str(folder), **arguments)


def test_batch_sizes_of_the_harness():
    assert adapter.rows_of_a_batch("8") == 8
    assert adapter.rows_of_a_batch("auto:4") == adapter.AUTO


def test_without_the_harness_an_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *more):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *more)

    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'alignax\[lm_eval\]'"):
        adapter.register()
    with pytest.raises(
        SystemExit, match=r"error: lm-evaluation-harness is not installed"
    ):
        command.main(["ls"])


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("--tasks x", "run --tasks x --model alignax"),
        ("run --tasks x", "run --tasks x --model alignax"),
        ("--model hf --tasks x", "--model hf --tasks x"),
        ("--model=hf", "--model=hf"),
        ("run -C x.yaml", "run -C x.yaml"),
        ("ls tasks", "ls tasks"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_the_command_takes_alignax_as_its_model(given, want):
    assert command.with_model(given.split()) == want.split()

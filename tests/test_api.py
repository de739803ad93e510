"""The public surface: what a notebook calls, on strings."""

import ast
import dataclasses
import inspect
import json
import pathlib
import re
import statistics
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import alignax as ax
from alignax import api, logprob
from alignax.batch import LM, from_groups
from alignax.models import transformer
from alignax.respond import respond
from alignax.sampling import stops as stop_places
from alignax.text.encoder import FunctionEncoder

pytestmark = pytest.mark.slow

NAME = "SmolLM2-135M-Instruct"  # what the examples load; here a small model
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(make_lm):
    config = transformer.ModelConfig(
        vocab_size=259, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_width=24, max_length=160, eos_ids=(257,),
    )  # fmt: skip
    return ax.Model(make_lm(config), ax.tokenizer("bytes"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A folder in which the examples of the docstrings find their model."""
    path = tmp_path_factory.mktemp("api")
    ax.save(model, str(path / NAME))
    return path


# -- names


def test_every_public_name_is_there_and_is_no_submodule():
    submodules = {p.stem for p in pathlib.Path(ax.__file__).parent.glob("*")}
    assert {*ax.__all__} == {*ax.PUBLIC}
    for name in ax.PUBLIC:
        assert callable(getattr(ax, name))
        assert name in dir(ax)
        assert name not in submodules
    assert ax.train is api.train
    assert ax.Batch is logprob.Batch


def test_what_a_type_checker_reads_is_what_there_is():
    tree = ast.parse(pathlib.Path(ax.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    listed = {a.name: n.module for n in block.body for a in n.names}
    assert listed == ax.PUBLIC
    # a module with a __getattr__ has every name, as far as a type checker can tell
    assert [n.name for n in block.orelse] == ["__getattr__"]
    assert "__getattr__" not in [getattr(n, "name", "") for n in tree.body]


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match=r"'laod'; did you mean 'load'\?"):
        ax.laod  # noqa: B018
    with pytest.raises(ImportError):
        from alignax import laod  # noqa: F401


def test_importing_alignax_is_quick_and_loads_nothing():
    code = (
        "import time; t = time.perf_counter(); import alignax; t = time.perf_counter() - t\n"
        "import sys; print(t, *{'jax', 'numpy', 'flax', 'alignax.api'} & {*sys.modules})"
    )
    times = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=tiny.ROOT, env=tiny.environment(),
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        assert out[1:] == []
        times.append(float(out[0]))
    assert statistics.median(times) < 0.2  # seconds


FUNCTIONS = [n for n in ax.PUBLIC if inspect.isfunction(getattr(ax, n))]


def example(name):
    """The code below 'Example:' in a docstring."""
    text = inspect.getdoc(getattr(ax, name))
    return textwrap.dedent(re.search(r"^Example:\n((?:  .*\n?|\n)+)", text, re.M)[1])


@pytest.fixture
def run_example(folder, tmp_path, monkeypatch):
    """run_example(name) in an empty folder, where the test stays."""
    (tmp_path / NAME).symlink_to(folder / NAME)
    monkeypatch.chdir(tmp_path)

    def run(name):
        code = example(name)
        assert re.search(rf"\bax\.{name}\(", code)
        exec(code, {"ax": ax})

    return run


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "train"])
def test_the_example_of_a_docstring_runs(name, run_example):
    run_example(name)


# -- load and save


def test_what_was_saved_loads_again(model, folder):
    again = ax.load(str(folder / NAME))
    jax.tree.map(np.testing.assert_array_equal, again.lm.params, model.lm.params)
    assert again.lm.config == model.lm.config
    text = "Grüße, 東京 \x00\t\n!"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.tokenizer.eos_ids == model.tokenizer.eos_ids
    assert again.tokenizer.bos_id == model.tokenizer.bos_id
    assert again.tokenizer.pad_id == model.tokenizer.pad_id
    ids = list(range(259))
    assert again.tokenizer.decode(ids) == model.tokenizer.decode(ids)
    with pytest.raises(FileExistsError):
        ax.save(model, str(folder / NAME))


def test_a_saved_folder_says_what_ends_a_response(folder):
    found = json.loads((folder / NAME / "generation_config.json").read_text())
    assert found == {"eos_token_id": [257], "pad_token_id": 258, "bos_token_id": 256}


def test_files_of_a_hugging_face_tokenizer_are_copied(model, folder, tmp_path):
    source = tmp_path / "source"
    ax.save(model, str(source))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "anything": [1, 2]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    kept = {"temperature": 0.6, "eos_token_id": [257, 65]}
    (source / "generation_config.json").write_text(json.dumps(kept))
    chat = ax.load(str(source))
    assert chat.tokenizer.eos_ids == {257, 65}
    ax.save(chat, str(tmp_path / "copy"))
    copied = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert copied == settings
    generation = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert generation["eos_token_id"] == [65, 257]
    again = ax.tokenizer(str(tmp_path / "copy"))
    assert again.fingerprint == chat.tokenizer.fingerprint


def test_nothing_at_a_path_says_so(tmp_path):
    for path in ("nothing", "nothing.gguf"):
        with pytest.raises(FileNotFoundError, match=path):
            ax.load(str(tmp_path / path))


def test_the_example_of_train_runs_and_parameters_are_on_the_device_that_jax_uses(
    run_example,
):
    """Of a run, too, which Orbax restores on the CPU."""
    run_example("train")
    second = jax.devices()[1]
    with jax.default_device(second):
        for path in ("runs/mine", NAME):
            found = ax.load(path)
            places = {d for x in jax.tree.leaves(found.lm.params) for d in x.devices()}
            assert places == {second}
            assert ax.score(found, "a", "b").logps.shape == (1, 3)


def test_bfloat16_is_kept_where_it_is_asked_for(model, folder, tmp_path):
    half = ax.load(str(folder / NAME), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.lm.params)} == {jnp.dtype("bfloat16")}
    assert half.lm.config.dtype == "bfloat16"
    ax.save(half, str(tmp_path / "half"))
    again = ax.load(str(tmp_path / "half"), dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.lm.params, half.lm.params)


def test_the_name_of_a_hub_is_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="names on a hub are not downloaded"):
        ax.load("HuggingFaceTB/SmolLM2-135M-Instruct")


# -- score


def test_scores_are_those_of_the_kernel_and_the_tokens_stand_beside_them(model):
    scored = ax.score(model, ["ab", "c"], ["de", "fgh"])
    assert scored.tokens == [[*"abde", "<eos>"], [*"cfgh", "<eos>"]]
    np.testing.assert_array_equal(scored.mask, [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    batch = from_groups(
        [[*b"ab"], [*b"c"]], [[[*b"de", 257]], [[*b"fgh", 257]]], length=5
    )
    want = np.asarray(jax.jit(logprob.score)(model.lm, batch).logps)[:, 0]
    # another width of the same rows: attention adds in another order
    np.testing.assert_allclose(scored.logps, want, atol=1e-5)
    assert (scored.logps[~scored.mask] == 0).all()
    assert scored.log_ratios is None


def test_one_prompt_needs_no_list_and_ids_are_taken_as_they_are(model):
    one = ax.score(model, "ab", "de")
    ids = ax.score(model, [*b"ab"], [*b"de", 257])
    many = ax.score(model, [[*b"ab"]], [[*b"de", 257]])
    arrays = ax.score(model, jnp.array([*b"ab"]), np.array([*b"de", 257]))
    rows = ax.score(model, [np.array([*b"ab"])], [jnp.array([*b"de", 257])])
    for other in (ids, many, arrays, rows):
        np.testing.assert_array_equal(one.logps, other.logps)
    assert one.logps.shape == (1, 5)


def test_log_ratios_to_a_reference(model, make_lm):
    ref = model._replace(lm=make_lm(model.lm.config, 1))
    scored = ax.score(model, "ab", "de", ref=ref)
    theirs = ax.score(ref, "ab", "de")
    np.testing.assert_allclose(
        scored.log_ratios, scored.logps - theirs.logps, atol=1e-6
    )
    assert np.abs(scored.log_ratios[scored.mask]).min() > 0
    itself = ax.score(model, "ab", "de", ref=model)
    assert (itself.log_ratios == 0).all()
    upper = FunctionEncoder(
        lambda s: [*s.upper().encode()], model.tokenizer.encoder.control
    )
    text = dataclasses.replace(model.tokenizer, encoder=upper)
    with pytest.raises(ValueError, match="row 0: the tokenizer of the reference"):
        ax.score(model, "ab", "de", ref=model._replace(tokenizer=text))


def test_of_messages_the_assistants_are_scored(model, tmp_path):
    ax.save(model, str(tmp_path / "chat"))
    settings = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = ax.load(str(tmp_path / "chat"))
    answer = [
        {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"},
        {"role": "assistant", "content": "OK"},
    ]  # fmt: skip
    scored = ax.score(chat, CHAT, answer)
    text = "".join(
        f"[{t}]" if m else t
        for t, m in zip(scored.tokens[0], scored.mask[0], strict=True)
    )
    assert text == "<user>Hi<assistant>[Y][o][<eos>]<user>?<assistant>[O][K][<eos>]"
    message = ax.score(chat, CHAT[0], answer)  # one message is a conversation
    np.testing.assert_array_equal(message.logps, scored.logps)
    same = ax.score(chat, [CHAT], [answer])
    np.testing.assert_array_equal(same.logps, scored.logps)


@pytest.mark.parametrize(
    "prompts, responses, message",
    [
        (["a"], ["b", "c"], "1 prompts and 2 responses"),
        (["a", "b"], "c", "2 prompts and 1 responses"),
        ("a" * 100, "b" * 100, "201 tokens, beyond the context of the model, 160"),
        ([1, 2], "c", "both ids, or both text"),
        ([], [], "the list is empty"),
        ([97, 259], [98], r"row 0 has the id 259, expected 0\.\.258"),
        ([[97], [98]], [[99], [-1]], "row 1 has the id -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        ax.score(model, prompts, responses)


# -- generate and speculate


def test_greedy_responses_are_the_likeliest_tokens(model):
    out = ax.generate(model, ["ab", "c"], max_new=10, temperature=0)
    assert [len(group) for group in out.texts] == [1, 1]

    @jax.jit
    def logits(ids):
        h, _ = transformer.hidden(model.lm, ids)
        return transformer.unembed(model.lm, h)

    for prompt, (text,), (finish,) in zip(
        ("ab", "c"), out.texts, out.finish, strict=True
    ):
        ids = [*prompt.encode()]
        for _ in range(10):
            row = np.array([ids + [0] * (12 - len(ids))])  # later ids are not seen
            ids.append(int(logits(row)[0, len(ids) - 1].argmax()))
            if ids[-1] == 257:
                break
        assert text == model.tokenizer.decode(ids[len(prompt) :])
        assert finish == ("eos" if ids[-1] == 257 else "length")


def test_a_response_is_a_function_of_the_seed(model):
    one, same, other = (
        ax.generate(model, "ab", max_new=16, group=2, seed=s) for s in (0, 0, 1)
    )
    assert one.texts == same.texts
    assert one.texts != other.texts
    assert len({*one.texts[0]}) > 1
    again = ax.score(
        model,
        [[*b"ab"]] * 2,
        [t[m].tolist() for t, m in zip(one.generated.batch.tokens[0], one.generated.batch.mask[0], strict=True)],
    )  # fmt: skip
    np.testing.assert_allclose(one.logps[0], again.logps.sum(-1), atol=1e-4)


def test_a_prefill_is_in_front_and_a_stop_string_cuts(model):
    greedy = {"max_new": 12, "temperature": 0}
    free = ax.generate(model, "ab", stops=["~~"], **greedy)  # the table has one shape
    assert free.finish == [["length"]]
    stop = free.texts[0][0][4:6]
    asked = dict(max_new=12, group=8, grammar="regex:(yes|no)[.!]?")
    assert {*ax.generate(model, "ab", **asked).texts[0]} <= {
        a + b for a in ("yes", "no") for b in ("", ".", "!")
    }
    cut = ax.generate(model, "ab", stops=[stop], **greedy)
    assert cut.texts[0][0] == free.texts[0][0].split(stop)[0]
    assert cut.finish == [["stop"]]
    alone = ax.generate(model, "ab", stops=stop, **greedy)
    assert alone.texts == cut.texts
    given = ax.generate(model, "a", prefill="b", **greedy)
    assert given.texts[0][0] == "b" + free.texts[0][0]


SHOUTS = (  # turns end in <pad>, which is no EOS of the tokenizer
    "{% if tools %}<{{ tools[0] }}>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{{ pad_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAD = 258


@pytest.fixture
def chat(model, tmp_path):
    """A folder of the model with another chat template."""
    path = tmp_path / "chat"
    ax.save(model, str(path))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = SHOUTS
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("way", ["generate", "ngram"])
def test_special_tokens_and_ids_are_stops(model, way):
    def ask(**asked):
        asked |= {"max_new": 6, "logit_bias": {PAD: 1000.0}}
        if way == "generate":
            return ax.generate(model, ["ab", "c"], **asked)
        return ax.speculate(model, way, ["ab", "c"], **asked)

    assert ask(stops=[PAD - 1, "x"]).finish == [["length"], ["length"]]
    for stops in ([PAD, "x"], "<pad>")[: 2 if way == "generate" else 1]:
        out = ask(stops=stops)
        assert (out.texts, out.finish) == ([[""], [""]], [["stop"], ["stop"]])
        assert out.generated.batch.mask.sum(-1).tolist() == [[1], [1]]
    for one in ("<pad>", PAD):
        text = model.tokenizer
        assert stop_places.parse(one, text) == stop_places.parse([one], text) != []
    out = ask(stops=["<pad><pad>"], min_new=4)
    assert out.generated.batch.mask.sum(-1).tolist() == [[4], [4]]


def test_the_end_of_turn_of_the_template_ends_a_response(chat, tmp_path):
    model = ax.load(str(chat))
    asked = {"max_new": 6, "logit_bias": {PAD: 1000.0}}
    out = ax.generate(model, CHAT, stops="<bos>", **asked)  # as many states as <pad>
    assert (out.texts, out.finish) == ([[""]], [["eos"]])
    assert ax.generate(model, CHAT, stops="<pad>", **asked).finish == [["stop"]]
    c = tiny.to_respond(tmp_path, **{"generate.logit_bias": ((PAD, 1000.0),)})
    c.model.path, c.tokenizer = str(chat), ""
    assert respond.respond(c, str(tmp_path / "run"))
    rows = (tmp_path / "run" / respond.NAME).read_text().splitlines()
    for row in map(json.loads, rows):
        assert (row["finish"], row["tokens"]) == (["eos", "eos"], [1, 1])


def test_a_prefill_continues_the_text_of_the_prompt(chat):
    model = ax.load(str(chat))
    asked = {"max_new": 4, "temperature": 0}
    one = ax.generate(model, [CHAT, "Hi there"], prefill="Yes", **asked)
    begun, further = (
        [[*CHAT, {"role": "assistant", "content": text}]] for text in ("Yes", "Yes, a")
    )
    two = ax.generate(model, begun, **asked)
    assert one.texts[0] == ["Yes" + two.texts[0][0]]
    np.testing.assert_allclose(one.logps[0], two.logps[0], atol=1e-4)
    both = ax.generate(model, begun, prefill=", a", **asked)
    more = ax.generate(model, further, **asked)
    assert both.texts[0] == [", a" + more.texts[0][0]]
    ids = ax.generate(model, [model.tokenizer.prompt(CHAT)], prefill="Yes", **asked)
    assert ids.texts[0] == one.texts[0]


def test_variables_of_the_template_reach_it(chat):
    model = ax.load(str(chat))
    template = {"tools": ["weather"]}
    front = len("<weather>")
    plain = ax.score(model, [CHAT], ["Yes"], ref=model)
    shown = ax.score(model, [CHAT], ["Yes"], ref=model, template=template)
    assert "".join(shown.tokens[0]) == "<weather>" + "".join(plain.tokens[0])
    assert shown.mask[0].sum() == plain.mask[0].sum()
    out = ax.generate(model, CHAT, max_new=4, temperature=0, template=template)
    ids = out.generated.batch.tokens[0, 0]
    assert model.tokenizer.decode(ids[:front]) == "<weather>"
    ids = ax.speculate(model, "ngram", CHAT, max_new=3, template=template)
    assert (
        model.tokenizer.decode(ids.generated.batch.tokens[0, 0][:front]) == "<weather>"
    )


@pytest.mark.parametrize("kind", ["model", "ngram", "layers:1"])
def test_greedy_speculation_generates_the_same_text(model, make_lm, kind):
    draft = kind
    if kind == "model":
        draft = model._replace(lm=make_lm(model.lm.config, 3))
    want = ax.generate(model, ["ab", "abab"], max_new=10, temperature=0)
    got = ax.speculate(model, draft, ["ab", "abab"], max_new=10, temperature=0)
    assert got.texts == want.texts
    assert got.generated.stats["tokens_per_target_call"] >= 1


def padded(model, make_lm, size, seed=0):
    """The model with other weights, in which rows that pad the table are loud."""
    lm = make_lm(dataclasses.replace(model.lm.config, vocab_size=size), seed)
    scale = np.where(np.arange(size) < 259, 1.0, 9.0)[:, None]
    return model._replace(
        lm=LM(lm.config, {**lm.params, "embed": lm.params["embed"] * scale})
    )


def test_no_id_beyond_the_tokenizer_is_generated(model, make_lm):
    wide, wider = (padded(model, make_lm, size, size) for size in (270, 300))

    @jax.jit
    def likely(lm, ids):
        h = transformer.hidden(lm, ids)[0]
        return jax.nn.softmax(transformer.unembed(lm, h)[0, -1])

    beyond = np.asarray(likely(wide.lm, np.array([[*b"ab"]])))[259:].sum()
    assert beyond > 0.9, "the case is empty"
    settings = dict(max_new=20, group=4, stops=["ab"], top_k=50)
    plain = ax.generate(wide, "ab", **settings).generated
    assert plain.batch.tokens.max() < 259
    fast = ax.speculate(wide, wider, "ab", **settings).generated
    assert fast.batch.tokens.max() < 259
    again = jax.jit(logprob.score)(wide.lm, plain.batch).logps
    np.testing.assert_allclose(plain.raw_logps, again, atol=1e-4)
    mask = plain.batch.mask
    assert (plain.batch.old_logps[mask] > plain.raw_logps[mask]).all()


def test_a_draft_of_another_tokenizer_is_refused(model, tmp_path):
    with zipfile.ZipFile(tiny.ROOT / "tests/golden/templates/chatml.zip") as packed:
        packed.extractall(tmp_path)
    other = model._replace(tokenizer=ax.tokenizer(str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"the draft has another tokenizer .*: id 0 is"
    ):
        ax.speculate(model, other, "ab", max_new=4)


def test_what_cannot_be_generated_is_refused(model):
    with pytest.raises(
        ValueError, match=r"162 tokens with max_new, beyond the context"
    ):
        ax.generate(model, "ab", max_new=160)
    for draft in ("layer:2", "layers:3", "layers:0", "SmolLM"):
        with pytest.raises(ValueError, match=rf"draft is '{draft}', expected a Model"):
            ax.speculate(model, draft, "ab", max_new=4)
    with pytest.raises(ValueError, match="row 0 has the id 300"):
        ax.generate(model, [300], max_new=4)
    with pytest.raises(ValueError, match="expected strings that are not empty"):
        ax.generate(model, "ab", max_new=4, stops=[""])
    with pytest.raises(ValueError, match=r"stops has 259, .* or ids 0\.\.258"):
        ax.generate(model, "ab", max_new=4, stops=[259])
    with pytest.raises(ValueError, match="expected 1 to"):
        ax.generate(model, "ab", max_new=4, limits=9)


# -- config and train


def test_a_config_is_the_defaults_with_changes():
    c = ax.config(num_steps=3, loss={"name": "dpo", "beta": 0.2}, optim={"lr": 1e-5})
    assert (c.num_steps, c.loss.beta, c.optim.lr, c.optim.name) == (
        3,
        0.2,
        1e-5,
        "adamw",
    )
    with pytest.raises(KeyError, match="num_steps"):
        ax.config(num_step=3)
    with pytest.raises(TypeError, match="int"):
        ax.config(num_steps="three")


def test_a_run_of_adapters_loads_merged_with_the_date_of_the_run(model, tmp_path):
    ax.save(model, str(tmp_path / "base"))
    data = {"name": "synthetic", "split": "train", "kind": "pairs", "size": 8}
    c = ax.config(num_steps=1, batch_size=4, length=96, data=data, plots=False)
    c.update(loss={"name": "dpo"}, lms={"ref": "init"}, lora={"rank": 2})
    c.update(tokenizer="bytes", date="2020-02-02")
    c.model.path = str(tmp_path / "base")
    ax.train(c, str(tmp_path / "run"))
    merged = ax.load(str(tmp_path / "run"))
    assert isinstance(merged.lm, LM)
    assert merged.tokenizer.now.year == 2020
    assert ax.tokenizer(str(tmp_path / "run")).encode("a") == [97]
    scored = ax.score(merged, "ab", "de", ref=model)
    assert np.abs(scored.log_ratios).max() < 1  # one step of a small rate

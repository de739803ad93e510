"""The LMs of a run: one tokenizer with tables of several sizes, or another tokenizer."""

import dataclasses
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import rewards
from alignax.batch import LM, Example, from_groups
from alignax.inputs import detokenize
from alignax.models import save, transformer
from alignax.text import tokenizer, tokenizer_files
from alignax.training import build, loading, loop, parallel

pytestmark = pytest.mark.slow

GOLDEN = tiny.ROOT / "tests" / "golden" / "templates"
CASES = tiny.ROOT.parent / "shared" / "cases"
SIZES = tiny.config().model.sizes.to_dict()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model(family, extra, ...): a folder of a tokenizer and of random weights.

    The table has `extra` rows more than the tokenizer has ids.
    """

    def make(family, extra=0, seed=0, **changes):
        folder = tmp_path_factory.mktemp(family) / "hf"
        with zipfile.ZipFile(GOLDEN / f"{family}.zip") as packed:
            files = {n: packed.read(n) for n in packed.namelist() if n != "golden.json"}
        more = len(json.loads(files["tokenizer.json"])["added_tokens"])
        size = len(json.loads(files["tokenizer.json"])["model"]["vocab"]) + more + extra
        config = transformer.ModelConfig(**{**SIZES, "vocab_size": size, **changes})
        lm = LM(config, transformer.init(config, jax.random.key(seed)))
        save.save(lm, folder, files=files)
        return str(folder)

    return make


def rows(tmp_path, *responses):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hello"}]
    path.write_text(
        "".join(
            json.dumps(
                {"prompt": turns, "response": [{"role": "assistant", "content": r}]}
            )
            + "\n"
            for r in responses
        )
    )
    return {"name": "jsonl", "path": str(path), "split": "train", "test_fraction": 0.0}


def config(tmp_path, path, **changes):
    c = tiny.config(num_steps=2, batch_size=2, **changes)
    c.tokenizer, c.model.path = "", path
    with c.unlocked():
        c.data = rows(tmp_path, "Hi, friend.", "four", "five and more", "No.")
    return c


def gkd(tmp_path, path, ref):
    c = config(tmp_path, path)
    with c.unlocked():
        c.loss = {"name": "gkd", "reverse": 0.5, "reduction": "token"}
        c.lms = {"ref": ref}
    return c


@pytest.mark.parametrize(("extra", "more"), [(0, 40), (40, 0), (3, 8)])
def test_a_teacher_of_another_table_teaches(model, tmp_path, extra, more):
    c = gkd(tmp_path, model("chatml", extra), model("chatml", more, seed=1, width=24))
    loop.train(c, str(tmp_path / "run"))
    run = build.build(c, str(tmp_path / "run"))
    sizes = {lm.config.vocab_size for lm in (run.policy, run.lms["ref"])}
    assert len(sizes) == 2
    batch = run.source.next(None, 0)
    scores = parallel.scorer(run.mesh)(
        run.policy, batch, ("kl", "forward_kl"), kl_to=run.lms["ref"]
    )
    mask = np.asarray(batch.mask)
    assert (scores.kl[mask] > 0).all()
    assert (scores.forward_kl[mask] > 0).all()


@pytest.mark.skipif(not CASES.exists(), reason="without the shared cases")
def test_the_kl_to_a_padded_teacher_is_that_of_float64(tmp_path):
    """`expected.json` is of torch in float64, over the 376 ids of the student's table."""
    folder = CASES / "padded_vocabulary"
    c = gkd(tmp_path, str(folder / "student"), str(folder / "teacher"))
    with c.unlocked():
        c.data.path, c.layout = str(folder / "sft.jsonl"), "rows"
    run = build.build(c, str(tmp_path / "run"))
    batch = run.source.next(None, 0)
    scores = parallel.scorer(run.mesh)(
        run.policy, batch, ("kl", "forward_kl"), kl_to=run.lms["ref"]
    )
    mask = np.asarray(batch.mask)
    assert mask.sum() == 4  # a word and EOS of both rows
    want = json.loads((folder / "expected.json").read_text())
    got = [scores.forward_kl[mask].mean(), scores.kl[mask].mean()]
    np.testing.assert_allclose(got, [*want.values()], atol=1e-5)


@pytest.mark.parametrize("section", ["loss", "draft", "evals"])
def test_an_lm_of_another_tokenizer_that_reads_ids_is_refused_by_name(
    model, tmp_path, section
):
    c = gkd(tmp_path, model("chatml"), model("generation"))
    message = r"lms\.ref: .* has another tokenizer than the run \(id \d+ is .*\), and "
    with c.unlocked():
        if section == "loss":
            message += r"loss losses\.gkd reads ids"
        else:
            c.loss = {"name": "sft"}
        if section == "draft":
            c.generate.draft = "ref"
            message += r"generate\.draft reads ids"
        if section == "evals":
            c.evals, c.eval_data = {"token_shift": {}}, c.data
            message += r"evals\.token_shift reads ids"
    with pytest.raises(ValueError, match=message):
        build.build(c, str(tmp_path / "run"))


def test_an_lm_of_another_tokenizer_is_no_teacher_in_the_kernel_either(model, tmp_path):
    """Where the config cannot know what reads it, the ids are refused when they are read."""
    c = config(tmp_path, model("chatml"))
    with c.unlocked():
        c.lms = {"someone": model("generation")}
    run = build.build(c, str(tmp_path / "run"))
    assert run.lms["someone"].config.tokenizer == c.lms.someone
    with pytest.raises(ValueError, match="another tokenizer than the run, that of"):
        parallel.scorer(run.mesh)(run.lms["someone"], run.source.next(None, 0))


def test_a_tokenizer_with_more_ids_than_the_table_trains(model, tmp_path):
    """As Gemma 3 1B, or Llama 2 with a pad token that was added: no row has that id."""
    path = model("generation", extra=-1)  # </think> has no row
    text = tokenizer.load(path)
    c = config(tmp_path, path)
    loop.train(c, str(tmp_path / "run"))
    run = build.build(c, str(tmp_path / "run"))
    assert run.policy.config.vocab_size == text.vocab_size - 1
    with c.unlocked():
        c.data = rows(tmp_path, "Hi", "a", "so </think> Hi", "b")
    top = text.vocab_size - 1
    message = (
        rf"token id {top} \('</think>'\) is beyond the model's vocabulary of {top}"
    )
    with pytest.raises(ValueError, match=message):
        build.build(c, str(tmp_path / "other"))


def test_a_pad_id_without_a_row_pads_nothing_with_it(tmp_path, model):
    path = model("generation", extra=-1)
    config_file = pathlib.Path(path) / "tokenizer_config.json"
    given = json.loads(config_file.read_text()) | {"pad_token": "</think>"}
    config_file.write_text(json.dumps(given))
    text = tokenizer.load(path)
    assert text.pad_id == text.vocab_size - 1
    run = build.build(config(tmp_path, path), str(tmp_path / "run"))
    assert np.asarray(run.source.next(None, 0).tokens).max() < text.pad_id


def test_weights_without_a_row_for_eos_are_refused(tmp_path, model):
    path = model("generation", extra=-7)  # of its added tokens it has none
    with pytest.raises(ValueError, match=r"the model only \d+, without EOS, \d+"):
        build.build(config(tmp_path, path), str(tmp_path / "run"))


def test_a_row_that_only_a_frozen_lm_lacks_is_refused(tmp_path, model):
    c = gkd(tmp_path, model("generation"), model("generation", extra=-1))
    build.build(c, str(tmp_path / "run"))
    with c.unlocked():
        c.data = rows(tmp_path, "Hi", "a", "so </think> Hi", "b")
    with pytest.raises(ValueError, match="is beyond the model's vocabulary"):
        build.build(c, str(tmp_path / "other"))


# -- a reward model of another tokenizer


def judged(path, text, prompts, texts, **more):
    """Scores of rewards.model with the LM of that path, which gets the run's ids."""
    lm = loading.load_lm(path)
    own, _ = loading.other_tokenizer(path, text)
    lm = LM(dataclasses.replace(lm.config, tokenizer=own), lm.params)
    ids = [text.prompt(p) for p in prompts]
    answers = [[[*text.encode(t), text.eos_id] for t in group] for group in texts]
    batch = from_groups(ids, answers, length=96)
    examples = [Example(str(i), p, ()) for i, p in enumerate(prompts)]
    handed = {"tokenizer": text, "examples": examples} | more
    return rewards.call(rewards.load("model"), batch, texts, {"reward": lm}, **handed)


@pytest.mark.skipif(not CASES.exists(), reason="without the shared cases")
def test_a_reward_model_of_another_tokenizer_scores_as_in_transformers():
    folder = CASES / "reward_other_tokenizer"
    text = tokenizer.load(folder / "policy")
    prompt = [{"role": "user", "content": "Hi"}]
    got = judged(str(folder / "reward"), text, [prompt], [["Hello", "Go away now"]])
    want = json.loads((folder / "expected.json").read_text())
    np.testing.assert_allclose(got, [*want.values()], atol=1e-5)


def test_the_text_is_rendered_again_by_the_reward_models_own_template(model):
    text = tokenizer.load(model("chatml"))
    path = model("generation", value_head=True, tied=False)
    own = tokenizer.load(path)
    prompts = ["Hello", [{"role": "user", "content": "what is two?"}]]
    texts = [["Hi, friend.", "No"], ["four", "five and on"]]
    got = judged(path, text, prompts, texts)
    lm = loading.load_lm(path)
    for b, prompt in enumerate(prompts):
        asked = [{"role": "user", "content": prompt}] if b == 0 else prompt
        for g, answer in enumerate(texts[b]):
            turns = [*asked, {"role": "assistant", "content": answer}]
            ids = own.encode(own.render(turns))
            ids = ids[: max(i for i, x in enumerate(ids) if x in own.eos_ids) + 1]
            h = transformer.hidden(lm, jnp.asarray([ids]))[0][0, -1]
            want = h @ lm.params["value_head"]["kernel"]
            assert got[b, g] == pytest.approx(float(want), abs=1e-4)


def test_a_response_that_writes_the_other_eos_is_scored_all_the_same(model):
    text, path = tokenizer.load(model("chatml")), model("generation", value_head=True)
    got = judged(path, text, ["Hello"], [["a <|eot|> b<|eot|>", "a  b"]])
    assert got[0, 0] == got[0, 1]


def test_a_row_beyond_the_context_loses_the_left_of_its_prompt(model):
    own = tokenizer.load(model("generation"))
    valid = np.ones((1, 1), bool)
    whole = detokenize.retokenize(["a b c " * 40], [["d"]], valid, own, length=999)
    cut = detokenize.retokenize(["a b c " * 40], [["d"]], valid, own, length=50)
    n = int(whole.lengths[0, 0])
    assert cut.lengths[0, 0] == 50
    np.testing.assert_array_equal(cut.tokens[0, 0, :50], whole.tokens[0, 0, n - 50 : n])
    long = detokenize.retokenize(["a"], [["d e " * 60]], valid, own, length=50)
    assert long.lengths[0, 0] == 50
    assert long.mask[0, 0, 1:50].all()


def test_without_the_text_of_the_prompts_it_is_refused(model):
    text, path = tokenizer.load(model("chatml")), model("generation", value_head=True)
    with pytest.raises(
        ValueError, match=r"lms\.reward has another tokenizer than the run"
    ):
        judged(path, text, ["Hello"], [["Hi"]], examples=None)


def test_rollouts_and_evaluations_are_judged_by_another_tokenizer(model, tmp_path):
    c = config(tmp_path, model("chatml", extra=9))
    judge = {"name": "model"}
    members = {"one": judge, "two": {"name": "model", "model": "reward"}}
    with c.unlocked():
        c.lms = {"reward": model("generation", value_head=True)}
        c.loss = {"name": "policy_gradient"}
        c.shaping = {"group_norm": {"scale": 1.0}}
        c.rollout.reward = {"name": "ensemble", "members": members}
        c.rollout.group, c.rollout.max_new = 2, 8
        c.evals = {"sample": {"reward": judge, "max_new": 4, "group": 2}}
        c.eval_data = c.data
        c.eval_every = 2
    loop.train(c, str(tmp_path / "run"))


# -- what counts as one tokenizer


def test_more_ids_and_another_template_are_the_same_tokenizer(model):
    chatml, think = (tokenizer.load(model(k)) for k in ("chatml", "open_think"))
    assert tokenizer_files.difference(chatml, think) == ""
    assert tokenizer_files.difference(think, chatml) == ""


def test_the_first_token_that_differs_is_named(model):
    one, other = (tokenizer.load(model(k)) for k in ("llama2", "chatml"))
    found = tokenizer_files.difference(one, other)
    assert found.startswith("id 0 is '<unk>' in ")
    assert found.count(" is ") == 1
    assert "in bytes" in tokenizer_files.difference(tokenizer.load("bytes"), one)


def test_weights_without_a_tokenizer_are_taken_to_have_the_runs(model, tmp_path):
    text = tokenizer.load(model("chatml"))
    lm = loading.load_lm(model("chatml"))
    save.save(lm, tmp_path / "bare")
    assert loading.other_tokenizer(str(tmp_path / "bare"), text) == ("", "")

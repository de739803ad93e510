"""Ranks and KL of a baseline against the plain twin in float64, position by position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import transformer as oracle

from alignax import logprob
from alignax.batch import Example
from alignax.evals import token_shift
from alignax.sampling import decode
from alignax.text import tokenizer

TK = tokenizer.load("bytes")
DATA = [Example("0", "ab", ["cdef"]), Example("1", "g", ["hi"]), Example("2", "jkl", ["m"])]  # fmt: skip


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=TK.vocab_size, num_layers=1)
    return make_lm(config), make_lm(config, 1)


@functools.cache
def jitted():
    return jax.jit(logprob.score, static_argnames="needs")


def run(lms, data=DATA, tok=TK, **hyper):
    def score(lm, batch, needs=(), **more):
        batch = jax.tree.map(jnp.asarray, batch)
        return jax.device_get(jitted()(lm, batch, needs=needs, **more))

    def generate(lm, prompts, lengths, key, **settings):
        return decode.generate(lm, prompts, lengths, key, eos_ids=[257], **settings)

    return token_shift.evaluate(
        lms[0], {"ref": lms[1]}, data, key=jax.random.key(0), tokenizer=tok,
        generate=generate, score=score, batch_size=2, length=32, **hyper,
    )  # fmt: skip


def logps(lm, ids):
    with jax.enable_x64(True):
        z = oracle.logits(lm.config, oracle.float64(lm.params), np.array(ids))
        return np.asarray(jax.nn.log_softmax(z))


def expected(lms, cases):
    """(kl, rank, probability) of every token of (prompt, base's prompt, response)."""
    out = []
    for prompt, bare, response in cases:
        p = logps(lms[0], prompt + response)[len(prompt) - 1 : -1]
        q = logps(lms[1], bare + response)[len(bare) - 1 : -1]
        kl = (np.exp(p) * (p - q)).sum(-1)
        mine = q[np.arange(len(response)), response]
        out.append((kl, 1 + (q > mine[:, None]).sum(-1), np.exp(mine)))
    return out


def test_shares_and_curves_by_hand(lms):
    got = run(lms, ranks=True)
    cases = [(TK.prompt(e), TK.prompt(e), TK.tokenize(e).responses[0]) for e in DATA]
    want = expected(lms, cases)
    kl, rank, prob = (np.concatenate(x) for x in zip(*want, strict=True))
    assert got["kl"] == pytest.approx(kl.mean(), abs=1e-4)
    assert got["unshifted"] == pytest.approx((rank == 1).mean())
    assert got["marginal"] == pytest.approx(((rank == 2) | (rank == 3)).mean())
    assert got["shifted"] == pytest.approx((rank > 3).mean())
    assert got["rank"] == pytest.approx(rank.mean())
    assert got["base_prob"] == pytest.approx(prob.mean(), abs=1e-5)
    third = [x for x in want if len(x[0]) >= 3]
    assert len(third) == 2
    assert got["rank/03"] == pytest.approx(np.mean([x[1][2] for x in third]))
    assert got["position/03"] == pytest.approx(np.mean([x[0][2] for x in third]), abs=1e-4)  # fmt: skip
    assert "rank/06" not in got
    assert run(lms)["kl"] == pytest.approx(got["kl"], abs=1e-5)  # the kernel's


def test_greedy_answers_of_the_model_are_unshifted_from_itself(lms):
    got = run((lms[0], lms[0]), ranks=True, max_new=5)
    assert got["unshifted"] == 1
    assert got["rank/05"] == 1
    assert got["kl"] == pytest.approx(0, abs=1e-6)
    other = run(lms, ranks=True, max_new=5)
    assert other["shifted"] > 0.5
    assert sum(other[k] for k in ("unshifted", "marginal", "shifted")) == pytest.approx(1)  # fmt: skip


def test_a_plain_baseline_reads_no_template(lms):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    chat = dataclasses.replace(TK, chat_template=template)
    got = run(lms, data=DATA[:1], tok=chat, ranks=True, plain=True)
    example = DATA[0]
    case = (
        chat.prompt(example),
        TK.prompt(example),
        chat.tokenize(example).responses[0],
    )
    assert case[0] != case[1]
    ((kl, rank, prob),) = expected(lms, [case])
    assert got["rank"] == pytest.approx(rank.mean())
    assert got["kl"] == pytest.approx(kl.mean(), abs=1e-4)
    assert got["base_prob"] == pytest.approx(prob.mean(), abs=1e-5)


def test_of_equally_likely_tokens_the_lower_id_ranks_first(lms):
    lm = lms[1]
    flat = lm._replace(
        params={**lm.params, "embed": jnp.zeros_like(lm.params["embed"])}
    )
    got = run((lms[0], flat), data=[Example("0", "a", ["\x03"])], ranks=True)
    assert got["rank/01"] == 4
    assert got["rank/02"] == 258


def test_a_baseline_that_lacks_an_id_is_refused(lms, tiny_lm):
    with pytest.raises(
        ValueError, match=r"the id \d+, which is beyond the ids 0\.\.36"
    ):
        run((lms[0], tiny_lm), ranks=True)


def test_both_ways_compare_the_common_ids_of_two_tables(lms, make_lm):
    """The kernel's KL and that beside the ranks, with a baseline of a larger table."""
    wide = make_lm(dataclasses.replace(lms[1].config, vocab_size=270), 3)
    one, other = (run((lms[0], wide), ranks=ranks) for ranks in (False, True))
    assert one["kl"] == pytest.approx(other["kl"], abs=1e-4)
    swapped = [run((wide, lms[0]), ranks=ranks) for ranks in (False, True)]
    assert swapped[0]["kl"] == pytest.approx(swapped[1]["kl"], abs=1e-4)

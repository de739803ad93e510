"""Directions are found where they were planted; what adding them costs has the paper's form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.models import transformer
from alignax.sampling import steering_vectors

V, N = 37, 96


def planted(seed=0, n=40, layers=2, width=12):
    """Pairs that share a direction and differ more from each other in another one."""
    rng = np.random.default_rng(seed)
    u = steering_vectors.random_vectors(layers, width, seed + 1)
    noise = rng.normal(size=(n, layers, width)) * np.r_[0.9, np.full(width - 1, 0.1)]
    noise -= noise.mean(0)
    negative = rng.normal(size=(n, layers, width))
    return u, negative + 2 * u + noise, negative


def test_a_planted_direction_is_found_with_its_sign_and_norm():
    u, positive, negative = planted()
    found = steering_vectors.reading_vectors(positive, negative)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-6)
    assert ((found * u).sum(-1) > 0.98).all()
    np.testing.assert_allclose(
        steering_vectors.reading_vectors(negative, positive), -found, atol=1e-6
    )
    # what the pairs share is their mean: a centred component would have lost it
    centred = (positive - negative)[:, 0] - (positive - negative)[:, 0].mean(0)
    other = np.linalg.svd(centred, full_matrices=False)[2][0]
    assert abs(other @ u[0]) < 0.7


def test_pairs_that_say_nothing_are_refused():
    _, positive, _ = planted()
    with pytest.raises(ValueError, match="do not differ"):
        steering_vectors.reading_vectors(positive, positive)
    with pytest.raises(ValueError, match=r"shapes \(40, 2, 12\) and \(39, 2, 12\)"):
        steering_vectors.reading_vectors(positive, positive[1:])


def test_states_are_what_the_edit_hook_sees_at_the_last_token(tiny_lm):
    tokens = np.array([[3, 1, 4, 1], [5, 9, 0, 0]])
    got = steering_vectors.states(tiny_lm, jnp.asarray(tokens), jnp.array([4, 2]))
    alone = steering_vectors.states(
        tiny_lm, jnp.asarray(tokens[1:, :2]), jnp.array([2])
    )
    assert got.shape == (2, 2, 16)
    np.testing.assert_allclose(got[1], alone[0], atol=1e-5)
    norm = transformer.Norm(tiny_lm.config.norm_eps, tiny_lm.config.norm_offset)
    last = norm.apply({"params": tiny_lm.params["norm"]}, got[:, -1])
    h, _ = transformer.hidden(tiny_lm, jnp.asarray(tokens))
    np.testing.assert_allclose(last, h[jnp.arange(2), jnp.array([3, 1])], atol=1e-5)


def test_texts_of_any_length_are_read_at_their_end(tiny_lm):
    positive, negative = [[3, 1, 4], [1, 5], [9]], [[2, 6], [5, 3, 5], [8]]

    def one(ids):
        return np.asarray(steering_vectors.states(tiny_lm, jnp.array([ids]), jnp.array([len(ids)])))  # fmt: skip

    want = steering_vectors.reading_vectors(
        *(np.concatenate([one(ids) for ids in side]) for side in (positive, negative))
    )
    got = steering_vectors.fit(tiny_lm, positive, negative, batch_size=2)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture(scope="module")
def prompts():
    return jnp.asarray(np.random.default_rng(0).integers(0, V, (N, 5)))


@jax.jit
def rows(lm, tokens, vectors, strength):
    h = transformer.hidden(lm, tokens, edit=steering_vectors.edit(vectors, strength))[0]
    return logprob.rows(lm, h[:, -1:])[:, 0]


def test_log_probabilities_are_those_of_the_edited_model(tiny_lm, prompts):
    vectors = jnp.asarray(steering_vectors.random_vectors(2, 16))
    want = rows(tiny_lm, prompts[:, :4], vectors, 0.7)
    want = np.asarray(want)[np.arange(N), prompts[:, 4]]
    at, mask = np.full((N, 16), 4), np.arange(16) < np.ones((N, 1))
    got = steering_vectors.logps(tiny_lm, vectors, 0.7, prompts, jnp.asarray(at), jnp.asarray(mask))  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_helpfulness_falls_with_the_square_of_the_strength(tiny_lm, prompts):
    """Of questions that have nothing to do with the vector, averaged over ±r."""
    vectors = jnp.asarray(steering_vectors.random_vectors(2, 16, seed=3))

    def right(r):
        return np.exp(np.asarray(rows(tiny_lm, prompts, vectors, r), np.float64))

    before = right(0.0)
    answer = before.argmax(-1)

    def lost(r):
        both = (right(r) + right(-r)) / 2
        return float((before - both)[np.arange(N), answer].mean())

    small, large = lost(0.15), lost(0.3)
    assert small > 0
    assert large / small == pytest.approx(4, abs=0.4)


def test_behaviour_moves_in_proportion_and_a_random_vector_hardly_moves_it(
    tiny_lm, prompts
):
    """The vector is read from texts that the model continues with 5, not 6, and others."""
    zero = jnp.zeros((2, 16))
    plain = np.asarray(rows(tiny_lm, prompts, zero, 0.0))
    order = np.argsort(plain[: N // 2, 6] - plain[: N // 2, 5])
    h = np.asarray(steering_vectors.states(tiny_lm, prompts, jnp.full(N, 5)))
    read = steering_vectors.reading_vectors(h[order[:16]], h[order[-16:]])

    def behaviour(vectors, r):
        z = np.asarray(rows(tiny_lm, prompts[N // 2 :], jnp.asarray(vectors), r))
        return np.tanh((z[:, 5] - z[:, 6]) / 2).mean()

    start = behaviour(read, 0.0)
    one, two = behaviour(read, 0.1) - start, behaviour(read, 0.2) - start
    assert one > 0
    assert two / one == pytest.approx(2, abs=0.2)
    others = [steering_vectors.random_vectors(2, 16, seed=s) for s in range(8)]
    control = [behaviour(v, 0.2) - start for v in others]
    assert two > 2 * np.sqrt(np.mean(np.square(control)))


def test_layers_are_chosen_from_either_end_and_what_is_wrong_is_named(
    tiny_lm, tmp_path
):
    path = tmp_path / "vectors.npy"
    np.save(path, steering_vectors.random_vectors(2, 16))
    got = np.asarray(steering_vectors.load(str(path), tiny_lm, layers=(-1,)))
    assert not got[0].any()
    np.testing.assert_array_equal(got[1], steering_vectors.random_vectors(2, 16)[1])
    random = steering_vectors.load("random", tiny_lm, seed=5)
    np.testing.assert_array_equal(random, steering_vectors.random_vectors(2, 16, 5))
    with pytest.raises(ValueError, match=r"layers has 2, expected -2..1"):
        steering_vectors.load("random", tiny_lm, layers=(2,))
    with pytest.raises(ValueError, match=r"shape \(3, 16\), expected \[L=2, D=16\]"):
        steering_vectors.load(np.ones((3, 16)), tiny_lm)
    with pytest.raises(OSError, match="nowhere"):
        steering_vectors.load(str(tmp_path / "nowhere.npy"), tiny_lm)

"""ReMax: the greedy response's reward as the baseline."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import firsts, group

from alignax.shaping import remax


def test_golden_number():
    batch = group([[1.0, 4.0], [2.0, -2.0]], lengths=[[1, 2], [1, 1]])
    got = np.asarray(remax.shape(batch, jnp.float32([[3.0], [-1.0]])))
    np.testing.assert_array_equal(got[0, 0], [0, 0, -2, 0, 0])
    np.testing.assert_array_equal(got[0, 1], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(firsts(got)[1], [3, -1])


def test_as_good_as_greedy_is_nothing_and_better_is_positive():
    batch = group([[0.7, 0.8, 0.6]])
    got = firsts(remax.shape(batch, jnp.float32([[0.7]])))[0]
    assert got[0] == 0
    assert got[2] < 0 < got[1]


def test_a_response_is_not_compared_with_its_group():
    baseline = jnp.float32([[1.0]])
    alone = firsts(remax.shape(group([[5.0]]), baseline))
    among = firsts(remax.shape(group([[5.0, 9.0, -7.0]]), baseline))
    assert alone[0, 0] == among[0, 0] == 4


def test_there_is_one_greedy_response():
    with pytest.raises(TypeError, match="baseline"):
        remax.shape(group([[1.0, 2.0]]), jnp.zeros((1, 2)))

"""A constant baseline: the reward less a number, on every token."""

import numpy as np
from shaping_groups import group, tokens

from alignax.shaping import constant


def test_by_hand():
    batch = group([[1.0, -2.0]], lengths=[[2, 1]], valid=np.array([[True, True]]))
    got = np.asarray(constant.shape(batch, None, value=0.5))
    np.testing.assert_array_equal(got[0], [[0, 0, 0.5, 0.5, 0], [0, 0, -2.5, 0, 0]])
    got = np.asarray(constant.shape(batch, None))
    np.testing.assert_array_equal(got[0], [[0, 0, 1, 1, 0], [0, 0, -2, 0, 0]])


def test_rewards_of_tokens_are_summed_and_the_invalid_get_nothing():
    batch = group([[0.0, 9.0]], lengths=[[3, 1]], valid=np.array([[True, False]]))
    batch = batch._replace(advantages=tokens(batch, [[[-1, -1, 4], [5]]]))
    got = np.asarray(constant.shape(batch, None, value=1.0))
    np.testing.assert_array_equal(got[0], [[0, 0, 1, 1, 1, 0], [0] * 6])

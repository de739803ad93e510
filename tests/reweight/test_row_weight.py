"""Weights and margins of rows: from a file into the step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import plugin
from alignax.batch import Scores
from alignax.data import jsonl
from alignax.losses import dpo, reward_model
from alignax.training import loop


@pytest.fixture
def given(make_batch):
    batch = make_batch(3, 2, 16)
    x = np.random.default_rng(0).uniform(-3, 0, (2, *batch.mask.shape))
    logps, ref = (jnp.where(batch.mask, jnp.float32(a), 0) for a in x)
    return Scores(logps, values=logps), batch._replace(ref_logps=ref)


def test_a_loss_is_multiplied_row_by_row(given):
    policy, batch = given
    weights = jnp.array([0.0, 1.0, 2.5])
    loss = plugin.compose(plugin.load("losses", "dpo"), [plugin.load("reweight", "row_weight")])  # fmt: skip
    got = loss(policy, batch._replace(extra={"weight": weights}))[0]
    np.testing.assert_allclose(got, weights * dpo.loss(policy, batch)[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"set config\.data\.numbers=\('weight',\)"):
        loss(policy, batch)


def test_a_margin_of_the_row_is_added(given):
    policy, batch = given
    own = jnp.array([0.0, 1.0, 3.0])
    got = reward_model.loss(policy, batch._replace(extra={"margin": own}), margin=0.5)[
        0
    ]
    want = [reward_model.loss(policy, batch, margin=0.5 + m)[0][b] for b, m in enumerate((0, 1, 3))]  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-6)


def rows(weights):
    return [
        {"prompt": f"Q{i}", "chosen": "good", "rejected": "bad", "weight": w, "note": 3}
        for i, w in enumerate(weights)
    ]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="pairs.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_numbers_of_a_file_are_carried_and_have_to_be_there(write):
    path = write(rows([1, 0.5]))
    found = jsonl.examples(split="all", path=path, numbers=("weight",))
    assert found.carried == ("weight",)
    assert jsonl.examples(split="all", path=path).carried == ()
    for bad in ("heavy", None):
        path = write(rows([1, bad]))
        with pytest.raises(ValueError, match=r"pairs\.jsonl:2: 'weight' is .*, expected a number"):  # fmt: skip
            jsonl.examples(split="all", path=path, numbers=("weight",))


def test_rows_of_weight_zero_leave_a_run_where_it_was(tmp_path, write):
    def trained(weights, name):
        config = tiny.config("pairs", num_steps=2)
        config.data = {"name": "jsonl", "split": "train", "path": write(rows(weights))}
        config.data.numbers = ("weight",)
        config.reweight = {"row_weight": {}}
        return loop.train(config, str(tmp_path / name)).params

    nothing, some = trained([0.0] * 8, "zero"), trained([1.0] * 8, "one")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), nothing, some)
    assert max(jax.tree.leaves(moved)) > 1e-4
    again = trained([0.0] * 8, "again")
    jax.tree.map(np.testing.assert_array_equal, nothing, again)

# %% [markdown]
# # Your own loss
#
# Write a preference loss in this notebook, train with it, and compare it with DPO, in about
# a minute on a CPU. The model is small and trained from scratch, and the preferences are
# synthetic: nothing is downloaded.
#
# In Colab, run the next cell without its `#` first.

# %%
# # !git clone REPOSITORY alignax
# # %cd alignax
# # %pip install -q -e .

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from alignax.batch import Scores, from_pairs
from alignax.configs import common, models
from alignax.losses import dpo
from alignax.reports import metrics
from alignax.training import loop

folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## What a loss is
#
# A batch is always `[B, G, T]`: B prompts, G responses per prompt, T tokens. For preferences
# G = 2, and slot 0 is the chosen response. A loss has no access to the model. Its inputs are
#
# - `policy.logps`, the log-probability in nats of every response token under the policy
#   (the model that is trained), exactly 0 elsewhere, so that `.sum(-1)` is log π(y|x);
# - `batch.ref_logps`, the same under the frozen reference.
#
# It returns one number per prompt and a dict of metrics. `NEEDS` lists the fields that it
# reads. The training step takes the mean over prompts, micro-batches and devices.
#
# Here is a hinge loss (Zhao et al. 2023, https://arxiv.org/abs/2305.10425) on the difference
# of DPO's implicit rewards. Its gradient is zero once the difference exceeds `margin`:
#
#     h = β Σₜ [log π(y⁺)/π_ref(y⁺)] - β Σₜ [log π(y⁻)/π_ref(y⁻)]
#     L = max(0, margin - h)

# %%
NEEDS = ("logps", "ref_logps")


def my_loss(policy, batch, *, beta: float = 0.1, margin: float = 1.0):
    """Hinge on the difference of implicit rewards."""
    log_ratio = (policy.logps - batch.ref_logps).sum(-1)  # [B, 2]
    h = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    value = jax.nn.relu(margin - h)
    inactive = (h > margin).astype(jnp.float32)  # pairs without a gradient
    return jnp.where(batch.valid.all(-1), value, 0.0), {"h": h, "inactive": inactive}


# %% [markdown]
# ## Check it by hand
#
# A loss is a function of arrays, so it can be tested on a few made-up numbers. In this pair
# the policy raised the log-probability of the chosen response by 4 nats and lowered that of
# the rejected one by 2. With β = 0.1, h = 0.6: the hinge loss is 0.4, DPO's is -log σ(0.6).

# %%
pair = from_pairs([[1]], [[2, 3]], [[4]], length=4)
ref_logps = jnp.where(pair.mask, -3.0, 0.0)
pair = pair._replace(ref_logps=ref_logps)
change = jnp.array([[[0.0, 1.0, 3.0, 0.0], [0.0, -2.0, 0.0, 0.0]]])
policy = Scores(logps=ref_logps + change)

hinge, _ = my_loss(policy, pair)
logistic, _ = dpo.loss(policy, pair)
print(f"hinge {hinge[0]:.4f}, DPO {logistic[0]:.4f}")
np.testing.assert_allclose(hinge, [0.4], rtol=1e-6)
np.testing.assert_allclose(logistic, [np.log1p(np.exp(-0.6))], rtol=1e-6)

# %% [markdown]
# Check the gradient too. With respect to the log-probability of a chosen token it is -β
# while the hinge is active, and it never vanishes for a pair that is ranked wrong.

# %%
gradient = jax.grad(lambda logps: my_loss(Scores(logps), pair)[0].sum())(policy.logps)
print(np.asarray(gradient[0]))
np.testing.assert_allclose(gradient[0, :, 1], [-0.1, 0.1], rtol=1e-6)

# %% [markdown]
# ## A policy to start from
#
# The synthetic reviews ("Truly stale food and helpful staff.") are preferred by a fixed
# score of their words. A short SFT gives a policy to start from.


# %%
def base_config():
    c = common.get_config()
    c.tokenizer = "bytes"
    c.model.sizes = models.tiny()
    c.length, c.buckets, c.batch_size = 72, (72,), 16
    c.layout = "rows"  # a model this small is slower on long, packed rows
    c.optim.warmup, c.plots = 5, False
    return c


def data(kind, split, size):
    return {"name": "synthetic", "kind": kind, "split": split, "size": size}


sft = base_config()
sft.num_steps, sft.optim.lr = 150, 1e-2
sft.loss = {"name": "sft", "reduction": "token"}
sft.data = data("sft", "train", 2048)
state = loop.train(sft, str(folder / "sft"))

# %% [markdown]
# ## Train with your loss
#
# `c.loss.name` is a file in `alignax/losses/` or the dotted name of any function; a function
# of a notebook is in the module `__main__`. The other keys are the hyper-parameters of the
# function. A typo in `margin` is an error before anything compiles.


# %%
def align(loss):
    c = base_config()
    c.num_steps, c.optim.lr = 60, 2e-3
    c.model.path = str(folder / "sft")
    c.lms = {"ref": "init"}  # the reference is the policy as it starts
    c.loss = loss
    c.data = data("pairs", "train", 1024)
    c.eval_data = data("pairs", "test", 128)
    c.evals = {"ranking_accuracy": {}}
    c.eval_every, c.eval_at_start = 20, True
    workdir = folder / loss["name"].rpartition(".")[2]
    loop.train(c, str(workdir))
    return metrics.read(workdir)


runs = {
    "hinge": align({"name": "__main__.my_loss", "beta": 0.1, "margin": 1.0}),
    "DPO": align({"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}),
}

# %% [markdown]
# ## Compare
#
# The plots show the training loss, and the accuracy of the implicit reward on held-out
# prompts with a 95 % interval. A tie counts as wrong, so the accuracy is 0 at step 0, where
# policy and reference agree. At step 0 DPO's loss is log 2 and the hinge loss is its margin.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), constrained_layout=True)
for name, rows in runs.items():
    loss = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    axes[0].plot(*zip(*loss, strict=True), label=name)
    key = "eval/ranking_accuracy/accuracy"
    points = [
        (r["step"], r[key], r[f"{key}/lo"], r[f"{key}/hi"]) for r in rows if key in r
    ]
    step, value, lo, hi = np.array(points).T
    axes[1].plot(step, value, marker="o", label=name)
    axes[1].fill_between(step, lo, hi, alpha=0.2)
    print(
        f"{name:>6}: accuracy {value[-1]:.3f} [{lo[-1]:.3f}, {hi[-1]:.3f}] on unseen pairs"
    )
axes[0].set(xlabel="step", ylabel="training loss")
axes[1].set(xlabel="step", ylabel="ranking accuracy, unseen pairs", ylim=(0, 1))
axes[1].axhline(0.5, color="grey", linewidth=0.8)
axes[0].legend()
plt.show()

# %% [markdown]
# ## Keep it
#
# Other things to try: `c.loss.margin = 0.2`, a loss on length-normalised log-ratios, a
# loss that reads `batch.feedback`. To keep a loss, move the function to
# `alignax/losses/NAME.py` as `loss`, with its source and equation on top; CONTRIBUTING.md
# names the three other files. The contract tests find the new file by themselves.

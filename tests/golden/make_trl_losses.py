"""Makes the golden losses: TRL's own trainers on given log-probabilities, CPU float32.

    python -m pip install torch transformers trl
    python tests/golden/make_trl_losses.py      (after make_transformers.py and make_trl.py)

What runs is TRL's code, not a copy of it: for each setting below a trainer is built from
TRL's own config, and `DPOTrainer._compute_loss`, `CPOTrainer.get_batch_loss_metrics` and
`ORPOTrainer.get_batch_loss_metrics` compute the loss of the four pairs of `trl_dpo.npz`.
In the place of the models stand functions that answer with the log-probabilities of that
file: `log_probs` to the DPO trainer, logits that have them to the others.

`trl_losses.npz` holds
  tokens, mask, lengths, logps, ref_logps     those of trl_dpo.npz, [B, 2, T]
  sorted_ref_logps float32[B,2,T]             the reference of losses that sort the batch:
                                              the last pair's are a tenth, since else its
                                              margins would be ordered as the policy's are
  collision float32[B,2,T]                    made up: log Σ_v π(v)² for the WPO weights
  prompt_logp                                 made up: of every prompt token (ORPO)
and for each setting NAME
  NAME.losses float32[B]      of each pair alone (not for losses that sort the batch)
  NAME.loss                   of the four pairs as one batch
  NAME.halves float32[2]      of pairs 0, 1 and of 2, 3 (for losses that sort the batch)
  NAME.grads float32[B,2,T]   derivatives by logps of the sum of the losses
"""

import os
import pathlib
import tempfile
import types

import make_transformers as tiny
import make_trl as made
import numpy as np
import torch
import transformers
import trl

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = pathlib.Path(__file__).parent
PROMPT = -1.5  # log-prob given to every prompt token: only ORPO's likelihood reads it

DPO = {
    "sigmoid": dict(beta=0.1),
    "sigmoid_smoothed": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.2),
    "robust": dict(beta=0.1, label_smoothing=0.1),
    "hinge": dict(beta=0.05),
    "ipo": dict(beta=0.1),
    "exo_pair": dict(beta=0.1, label_smoothing=1e-3),
    "nca_pair": dict(beta=0.05),
    "bco_pair": dict(beta=0.05),
    "sppo_hard": dict(beta=0.05),
    "aot": dict(beta=0.05, label_smoothing=0.1),
    "aot_unpaired": dict(beta=0.05, label_smoothing=0.1),
    "apo_zero": dict(beta=0.1),
    "apo_down": dict(beta=0.1),
    "discopop": dict(beta=0.05, discopop_tau=0.05),
    "sigmoid_norm": dict(beta=2.0),
    "forward_kl": dict(loss_type="sigmoid", f_divergence_type="forward_kl"),
    "js": dict(loss_type="sigmoid", f_divergence_type="js_divergence"),
    "alpha": dict(
        loss_type="sigmoid",
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.3,
    ),
    "ld": dict(loss_type="sigmoid", ld_alpha=0.4),
    "wpo": dict(loss_type="sigmoid", use_weighting=True),
    "rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
}
CPO = {
    "simpo": dict(beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0),
    "cpo": dict(loss_type="sigmoid", beta=0.1, cpo_alpha=0.5),
}
SORTED = ("aot", "aot_unpaired")


def trainer(kind, config, folder, **more):
    """A TRL trainer of the tiny policy on the four pairs."""
    return kind(
        model=made.load("llama_tied"),
        args=made.arguments(config.pop("kind"), folder, max_length=64, **config),
        train_dataset=made.pairs(),
        processing_class=made.tokenizer(),
        **more,
    )


class Given:
    """The four pairs as torch tensors, each [B, 2, T]."""

    def __init__(self, golden, collision):
        self.tokens = torch.tensor(golden["tokens"]).long()
        self.mask = torch.tensor(golden["mask"])
        self.lengths = torch.tensor(golden["lengths"])
        self.logps = torch.tensor(golden["logps"])
        self.ref_logps = torch.tensor(golden["ref_logps"])
        self.collision = torch.tensor(collision)
        self.real = torch.arange(self.tokens.shape[-1]) < self.lengths[..., None]


def stacked(x, rows):
    """[B, 2, ...] -> [chosen; rejected] of some pairs, as TRL stacks them."""
    return torch.cat([x[rows, 0], x[rows, 1]])


def dpo_loss(trainer, given, rows, logps):
    def answer(logps):
        shifted = stacked(logps, rows)[:, 1:]
        zeros = torch.zeros_like(shifted)
        return lambda **_: types.SimpleNamespace(
            log_probs=shifted, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
            log_sum_sq_probs=stacked(given.collision, rows)[:, 1:],
        )  # fmt: skip

    inputs = {
        "input_ids": stacked(given.tokens, rows),
        "attention_mask": stacked(given.real, rows).long(),
        "completion_mask": stacked(given.mask, rows).long(),
    }
    trainer.ref_model = answer(given.ref_logps)
    return trainer._compute_loss(answer(logps), inputs, False)


def logits_loss(trainer, given, rows, logps, *, hide_prompt):
    """For the trainers that read logits [N, T, V]: laws that give each token its log-prob."""
    tokens, mask = stacked(given.tokens, rows), stacked(given.mask, rows)
    real = stacked(given.real, rows)
    wanted = torch.where(mask, stacked(logps, rows), torch.tensor(PROMPT))[:, 1:]
    rest = torch.log(-torch.expm1(wanted)) - np.log(tiny.VOCAB - 1)
    laws = rest[..., None].expand(*rest.shape, tiny.VOCAB)
    laws = laws.scatter(2, tokens[:, 1:, None], wanted[..., None])
    laws = torch.cat([laws, torch.zeros_like(laws[:, :1])], 1)
    labels = torch.where(mask, tokens, -100)
    attention = (mask if hide_prompt else real).long()
    batch = {}
    for i, side in enumerate(("chosen", "rejected")):
        for name, x in (
            ("input_ids", tokens), ("attention_mask", attention), ("labels", labels)
        ):  # fmt: skip
            batch[f"{side}_{name}"] = x.chunk(2)[i]
    return trainer.get_batch_loss_metrics(
        lambda *_, **__: types.SimpleNamespace(logits=laws), batch
    )[0]


def run(name, given, loss):
    """The entries of one setting; `loss(rows, logps)` is TRL's."""
    b = len(given.tokens)
    logps = given.logps.clone().requires_grad_()
    whole = loss(list(range(b)), logps)
    out = {"loss": whole.item()}
    if name in SORTED:
        (b * whole).backward()
        out["halves"] = [loss([i, i + 1], given.logps).item() for i in range(0, b, 2)]
    else:
        alone = torch.stack([loss([i], logps) for i in range(b)])
        alone.sum().backward()
        out["losses"] = alone.detach().numpy()
    out["grads"] = logps.grad.numpy()
    print(f"{name:18} {out['loss']:12.6f} {out.get('losses', out.get('halves'))}")
    return {f"{name}.{k}": np.asarray(v, np.float32) for k, v in out.items()}


def main():
    golden = np.load(HERE / "trl_dpo.npz")
    rng = np.random.default_rng(8)
    collision = np.where(
        golden["mask"], golden["logps"] + rng.uniform(-0.5, 1, golden["mask"].shape), 0
    ).astype(np.float32)
    sorted_ref_logps = golden["ref_logps"].copy()
    sorted_ref_logps[-1] *= 0.1
    given = Given(golden, collision)
    out = {k: golden[k] for k in ("tokens", "mask", "lengths", "logps", "ref_logps")}
    out |= {"collision": collision, "sorted_ref_logps": sorted_ref_logps}
    out |= {"prompt_logp": np.float32(PROMPT)}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in DPO.items():
            given.ref_logps = torch.tensor(
                sorted_ref_logps if name in SORTED else golden["ref_logps"]
            )
            config = {"kind": trl.DPOConfig, "beta": 0.1, "loss_type": name, **settings}
            t = trainer(
                trl.DPOTrainer, config, folder, ref_model=made.load("llama_ref")
            )
            out |= run(name, given, lambda rows, x, t=t: dpo_loss(t, given, rows, x))
        for name, settings in CPO.items():
            config = {"kind": CPOConfig, "loss_type": name, **settings}
            t = trainer(CPOTrainer, config, folder)
            out |= run(
                name, given,
                lambda rows, x, t=t: logits_loss(t, given, rows, x, hide_prompt=False),
            )  # fmt: skip
        t = trainer(ORPOTrainer, {"kind": ORPOConfig, "beta": 0.3}, folder)
        for name, hide in (("orpo", True), ("orpo_prompt", False)):
            out |= run(
                name, given,
                lambda rows, x, hide=hide: logits_loss(
                    t, given, rows, x, hide_prompt=hide
                ),
            )  # fmt: skip
    np.savez_compressed(HERE / "trl_losses.npz", **out)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("trl", trl.__version__, "transformers", transformers.__version__)
    main()

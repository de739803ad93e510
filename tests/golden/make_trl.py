"""Makes the golden preference numbers: TRL's own trainers on tiny llamas, CPU float32.

    python -m pip install torch transformers trl
    python tests/golden/make_transformers.py && python tests/golden/make_trl.py

What runs is TRL's code, not a copy of it: `DPOTrainer(...)` tokenises a four-pair dataset
with a word-level tokenizer, its collator pads, `DPOTrainer._compute_loss` gives the loss and
its metrics (for the batch and pair by pair), and the per-token numbers come from the same
fused head that `_compute_loss` calls. `RewardTrainer.compute_loss` likewise.

  policy     tests/golden/llama_tied      reference  tests/golden/llama_ref
  reward     tests/golden/llama_reward    (LlamaForSequenceClassification, one label)

`trl_dpo.npz` holds, for B=4 pairs in the layout [B, 2, T] (slot 0 chosen):
  tokens int32, mask bool, lengths int32[B,2]      what TRL tokenised
  logps, ref_logps float32[B,2,T]                  log p(tokens[t] | tokens[<t]), 0 off the mask
  beta, loss, losses[B], chosen_rewards[B], rejected_rewards[B]
  grad_norm, grad_q (layer 0), grad_final_norm     of the batch loss, torch layout
`trl_reward.npz` holds tokens, lengths, rewards[B,2], loss, losses[B].
"""

import pathlib
import tempfile

import make_transformers as tiny
import numpy as np
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset

HERE = pathlib.Path(__file__).parent
BETA, PAD, EOS = 0.1, 0, 2


def tokenizer():
    vocab = {f"t{i}": i for i in range(tiny.VOCAB)}
    vocab["<pad>"], vocab["</s>"] = vocab.pop(f"t{PAD}"), vocab.pop(f"t{EOS}")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="t1"
    )


def pairs():
    """Four pairs of different lengths; in one, chosen is longer than rejected, in one shorter."""
    rng = np.random.default_rng(5)

    def words(n):
        return " ".join(f"t{i}" for i in rng.integers(3, tiny.VOCAB, n))

    sizes = [(3, 5, 9), (7, 10, 4), (1, 2, 2), (9, 6, 13)]
    return Dataset.from_list(
        [
            {"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)}
            for p, c, r in sizes
        ]
    )


def slots(x):
    """[chosen; rejected] as TRL stacks them -> [B, 2, ...]."""
    return np.stack(np.split(np.asarray(x), 2), 1)


def load(name, kind=transformers.AutoModelForCausalLM, **kwargs):
    return kind.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager", **kwargs
    )


def arguments(kind, folder, **kwargs):
    return kind(
        output_dir=folder, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4,
        gradient_checkpointing=False, **kwargs,
    )  # fmt: skip


def token_logps(model, batch):
    """Per-token log-probabilities from the fused head TRL's loss itself calls, as [N, T]."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True,
        )  # fmt: skip
    logps = out.log_probs
    first = torch.zeros_like(logps[:, :1])
    logps = torch.cat([first, logps], 1)[:, : labels.shape[1]]
    assert logps.shape == labels.shape
    assert bool((logps[batch["completion_mask"] == 0] == 0).all())
    return logps


def make_dpo():
    config = transformers.AutoConfig.from_pretrained(HERE / "llama_tied")
    reference = tiny.randomise(transformers.LlamaForCausalLM(config).float(), 55)
    tiny.save(reference, HERE / "llama_ref")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=load("llama_tied"),
            ref_model=load("llama_ref"),
            args=arguments(
                trl.DPOConfig, folder, beta=BETA, loss_type=["sigmoid"], max_length=64
            ),
            train_dataset=pairs(),
            processing_class=tokenizer(),
        )
        rows = list(trainer.train_dataset)
        batch = trainer.data_collator(rows)
        loss = trainer._compute_loss(trainer.model, batch, False)
        loss.backward()
        grads = {
            k: p.grad for k, p in trainer.model.named_parameters() if p.grad is not None
        }
        trainer.model.eval()
        losses, chosen, rejected = [], [], []
        for row in rows:
            with torch.no_grad():
                one = trainer._compute_loss(
                    trainer.model, trainer.data_collator([row]), False
                )
            losses.append(one.item())
            chosen.append(trainer._metrics["eval"]["rewards/chosen"][-1])
            rejected.append(trainer._metrics["eval"]["rewards/rejected"][-1])
        logps = token_logps(trainer.model, batch)
        ref_logps = token_logps(trainer.ref_model, batch)
    assert abs(np.mean(losses) - loss.item()) < 1e-6
    np.savez_compressed(
        HERE / "trl_dpo.npz",
        tokens=slots(batch["input_ids"]).astype(np.int32),
        mask=slots(batch["completion_mask"]).astype(bool),
        lengths=slots(batch["attention_mask"].sum(1)).astype(np.int32),
        logps=slots(logps.numpy()),
        ref_logps=slots(ref_logps.numpy()),
        beta=np.float64(BETA),
        loss=np.float64(loss.item()),
        losses=np.array(losses),
        chosen_rewards=np.array(chosen),
        rejected_rewards=np.array(rejected),
        grad_norm=np.float64(sum(float((g**2).sum()) for g in grads.values()) ** 0.5),
        grad_q=grads["model.layers.0.self_attn.q_proj.weight"].numpy(),
        grad_final_norm=grads["model.norm.weight"].numpy(),
    )
    print("dpo loss", loss.item(), "losses", losses, "rewards", chosen, rejected)


def make_reward():
    config = transformers.AutoConfig.from_pretrained(
        HERE / "llama_tied", num_labels=1, pad_token_id=PAD
    )
    model = transformers.LlamaForSequenceClassification(config).float()
    tiny.save(tiny.randomise(model, 66), HERE / "llama_reward")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.RewardTrainer(
            model=load(
                "llama_reward",
                transformers.AutoModelForSequenceClassification,
                num_labels=1,
            ),
            args=arguments(trl.RewardConfig, folder, max_length=64),
            train_dataset=pairs(),
            processing_class=tokenizer(),
        )
        trainer.model.eval()
        rows = list(trainer.train_dataset)
        losses = []
        with torch.no_grad():
            batch = trainer.data_collator(rows)
            loss, out = trainer.compute_loss(
                trainer.model, dict(batch), return_outputs=True
            )
            for row in rows:
                one = trainer.compute_loss(
                    trainer.model, dict(trainer.data_collator([row]))
                )
                losses.append(one.item())
    np.savez_compressed(
        HERE / "trl_reward.npz",
        tokens=slots(batch["input_ids"]).astype(np.int32),
        lengths=slots(batch["attention_mask"].sum(1)).astype(np.int32),
        rewards=slots(out.logits.squeeze(-1).numpy()),
        loss=np.float64(loss.item()),
        losses=np.array(losses),
    )
    print("reward loss", loss.item(), losses, out.logits.squeeze(-1).tolist())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("trl", trl.__version__, "transformers", transformers.__version__)
    make_dpo()
    make_reward()

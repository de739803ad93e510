"""Makes the golden adapters: LoRA directories as PEFT saves them, run by PEFT on CPU.

    python -m pip install torch transformers peft
    python tests/golden/make_peft.py          (after make_transformers.py)
    python tests/golden/make_peft.py --check DIRECTORY ...

Each case becomes a directory `tests/golden/<name>/` with adapter_config.json and
adapter_model.safetensors as `PeftModel.save_pretrained` writes them, and `golden.npz`:
ids int32[N,T] and the logits float32[N,T,V] of the base with these adapters. The base is
the directory beside it that adapter_config.json names. Every A and B is random: B at zero,
as PEFT starts, would show nothing. What is trained in full is drawn near its start.

`--check` reads directories that alignax wrote (`peft.save`), as PEFT reads its own, and
compares logits: each has a golden.npz copied from one of the cases beside it.
"""

import argparse
import json
import pathlib
import shutil

import make_transformers as tiny
import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
CASES = {  # name: (base, settings)
    "peft_llama": ("llama_tied", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "peft_rslora": (
        "llama_untied",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_rslora": True},
    ),
    "peft_qwen2": (
        "qwen2",
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "peft_dora": (
        "llama_untied",
        {
            "r": 3, "lora_alpha": 6, "use_dora": True, "use_rslora": True,
            "target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"lm_head": 9},
        },
    ),
    "peft_layers": (
        "llama_tied",
        {
            "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1], "layers_pattern": ["layers"],
            "rank_pattern": {"layers.1.mlp.up_proj": 5, "q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
            "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
        },
    ),
    "peft_regex": (
        "qwen2",
        {
            "r": 2, "lora_alpha": 8, "bias": "all", "use_dora": True,
            "target_modules": r".*\.(0\.self_attn\.[qk]|1\.(self_attn\.[qo]|mlp\.up))_proj",
            "rank_pattern": {r".*0\.self_attn\.q_proj": 4}, "exclude_modules": ".*k_proj",
        },
    ),
    "peft_biases": ("qwen2", {**Q, "bias": "lora_only", "layers_to_transform": 0}),
    "peft_saved": ("llama_untied", {**Q, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "peft_untied": ("llama_tied", {**Q, "target_modules": ["q_proj", "embed_tokens"]}),
    "peft_tied": (
        "llama_tied",
        {**Q, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "peft_tokens": ("llama_tied", {**Q, "trainable_token_indices": [5, 90, 7]}),
    "peft_reward": ("llama_tied", {**Q, "task_type": "SEQ_CLS"}),
}  # fmt: skip


def base(name, task="CAUSAL_LM"):
    model = transformers.AutoModelForCausalLM
    more = {}
    if task == "SEQ_CLS":
        model, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    return model.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager", **more
    )


def logits(model, ids):
    """Logits [N,T,V]; of a classifier, its score at every position [N,T,1]."""
    with torch.no_grad():
        model = model.eval()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if hasattr(inner, "score"):
            return inner.score(inner.model(ids).last_hidden_state).float().numpy()
        return model(ids).logits.float().numpy()


def draw(model, seed):
    """Random values for all that is trained."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p):
        return torch.randn(p.shape, generator=generator)

    for key, p in model.named_parameters():
        if "magnitude" in key:
            p.data.mul_(1 + 0.2 * normal(p))
        elif "lora_" in key:  # products nearly as large as the kernels beside them
            p.data.copy_(0.15 * normal(p))
        elif p.requires_grad:
            p.data.add_(0.1 * normal(p))
    return generator


def make(name, seed):
    on, settings = CASES[name]
    path = HERE / name
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "lora_dropout": 0.1, **settings}
    )
    task = config.task_type
    model = peft.get_peft_model(base(on, task), config)
    generator = draw(model, seed)
    model.peft_config["default"].base_model_name_or_path = on
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, save_embedding_layers=name == "peft_untied")
    (path / "README.md").unlink(missing_ok=True)
    settings = path / "adapter_config.json"
    text = json.loads(settings.read_text())
    if isinstance(text["target_modules"], list):
        text["target_modules"] = sorted(text["target_modules"])  # PEFT keeps a set
    settings.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")

    ids = torch.randint(0, tiny.VOCAB, (tiny.ROWS, tiny.LENGTH), generator=generator)
    want = logits(model, ids)
    again = logits(peft.PeftModel.from_pretrained(base(on, task), path), ids)
    assert np.array_equal(want, again), "what was saved is not what was run"
    golden = {"ids": ids.numpy().astype(np.int32), "logits": want}
    np.savez_compressed(path / "golden.npz", **golden)
    if task == "CAUSAL_LM":
        moved = np.abs(want - logits(base(on), ids)).max()
        assert moved > 0.3, f"the adapters move the logits by {moved} only"
    print(f"{name:12s} on {on:12s}: outputs up to {np.abs(want).max():.1f}")


def check(path):
    """PEFT's logits of a directory that alignax wrote."""
    path = pathlib.Path(path)
    settings = json.loads((path / "adapter_config.json").read_text())
    golden = np.load(path / "golden.npz")
    on = base(settings["base_model_name_or_path"], settings["task_type"])
    got = logits(
        peft.PeftModel.from_pretrained(on, path), torch.tensor(golden["ids"]).long()
    )
    error = np.abs(got - golden["logits"]).max()
    assert error < 2e-5, f"{path}: logits differ by {error}"
    print(f"{path}: PEFT computes the same logits (largest difference {error:g})")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="+", default=[], metavar="DIRECTORY")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    for directory in (arguments := parser.parse_args()).check:
        check(directory)
    if not arguments.check:
        for i, name in enumerate(CASES):
            if name in arguments.only:
                make(name, 300 + i)

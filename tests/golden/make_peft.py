"""Makes the golden adapters: LoRA directories as PEFT saves them, run by PEFT on CPU.

    python -m pip install torch transformers peft
    python tests/golden/make_peft.py          (after make_transformers.py)
    python tests/golden/make_peft.py --check DIRECTORY ...

Each case becomes a directory `tests/golden/<name>/` with adapter_config.json and
adapter_model.safetensors as `PeftModel.save_pretrained` writes them, and `golden.npz`:
ids int32[N,T] and the logits float32[N,T,V] of the base with these adapters. The base is
the directory beside it that adapter_config.json names. Every A and B is random: B at zero,
as PEFT starts, would show nothing.

`--check` reads directories that alignax wrote (`lora.save`), as PEFT reads its own, and
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
CASES = {
    "peft_llama": ("llama_tied", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "peft_rslora": (
        "llama_untied",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_rslora": True},
    ),
    "peft_qwen2": (
        "qwen2",
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
}


def base(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager"
    )


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float().numpy()


def make(name, seed):
    on, settings = CASES[name]
    path = HERE / name
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **settings)
    model = peft.get_peft_model(base(on), config)
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if "lora_" in key:  # products nearly as large as the kernels beside them
            p.data.copy_(0.15 * torch.randn(p.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = on
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)
    settings = path / "adapter_config.json"
    text = json.loads(settings.read_text())
    text["target_modules"] = sorted(text["target_modules"])  # PEFT keeps a set
    settings.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")

    ids = torch.randint(0, tiny.VOCAB, (tiny.ROWS, tiny.LENGTH), generator=generator)
    want = logits(model, ids)
    again = logits(peft.PeftModel.from_pretrained(base(on), path), ids)
    assert np.array_equal(want, again), "what was saved is not what was run"
    moved = np.abs(want - logits(base(on), ids)).max()
    assert moved > 0.5, f"the adapters move the logits by {moved} only"
    golden = {"ids": ids.numpy().astype(np.int32), "logits": want}
    np.savez_compressed(path / "golden.npz", **golden)
    print(f"{name:12s} on {on:12s} moves the logits by up to {moved:.1f}")


def check(path):
    """PEFT's logits of a directory that alignax wrote."""
    path = pathlib.Path(path)
    on = json.loads((path / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    golden = np.load(path / "golden.npz")
    got = logits(
        peft.PeftModel.from_pretrained(base(on), path),
        torch.tensor(golden["ids"]).long(),
    )
    error = np.abs(got - golden["logits"]).max()
    assert error < 1e-5, f"{path}: logits differ by {error}"
    print(f"{path}: PEFT computes the same logits (largest difference {error:g})")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="+", default=[], metavar="DIRECTORY")
    for directory in (arguments := parser.parse_args()).check:
        check(directory)
    if not arguments.check:
        for i, name in enumerate(CASES):
            make(name, 300 + i)

"""Sizes of models, for configs without a checkpoint, and the smoke variant of a config."""


def tiny() -> dict:
    """A model for tests: a step takes milliseconds."""
    return dict(
        width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, max_length=512
    )  # fmt: skip


def small() -> dict:
    """The quickstart's model: learns short English templates from bytes on a laptop."""
    return dict(
        width=128, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=256, max_length=256
    )  # fmt: skip


def llama3_8b() -> dict:
    """Llama 3 8B: https://arxiv.org/abs/2407.21783, table 3."""
    return dict(
        vocab_size=128_256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14_336, max_length=8192, norm_eps=1e-5, rope_theta=500_000.0, tied=False,
    )  # fmt: skip


def llama3_70b() -> dict:
    """Llama 3 70B: the same table."""
    return {
        **llama3_8b(), "width": 8192, "num_layers": 80, "num_heads": 64, "mlp_width": 28_672,
    }  # fmt: skip


def qwen2_5_1_5b() -> dict:
    """Qwen2.5 1.5B: https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct, config.json."""
    return dict(
        vocab_size=151_936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2,
        head_dim=128, mlp_width=8960, max_length=32_768, family="qwen2", qkv_bias=True,
        norm_eps=1e-6, rope_theta=1e6,
    )  # fmt: skip


def is_smoke(arg: str) -> bool:
    """Whether `CONFIG.py:arg` is the smoke variant.

    Raises:
      ValueError: another variant.
    """
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r} of this config, only 'smoke'")
    return arg == "smoke"


def smoke(c, *, kind: str) -> None:
    """Changes a config into two steps of a tiny model on synthetic data."""
    c.model.path, c.model.sizes, c.model.dtype = "", tiny(), "float32"
    c.tokenizer = "bytes"
    c.mesh = (1, 1, 1)
    c.num_steps, c.batch_size, c.length, c.buckets = 2, 4, 72, (72,)
    c.optim.warmup = c.eval_every = c.checkpoint.every = 0
    data = {"name": "synthetic", "kind": kind}
    c.data = {**data, "split": "train", "size": 64}
    c.eval_data = {**data, "split": "test", "size": 16}

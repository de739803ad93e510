"""Sizes of known models, for configs that start from scratch or only explain."""


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

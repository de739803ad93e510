"""Eight fake CPU devices, quick compiles, and the small things most tests start from.

Compiling, not computing, is what the suite waits for. So XLA optimises little here
(`optimised` opts out) and keeps what took long to compile in a folder of the user's.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal

FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",  # splitting costs more than it gains here
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The other emitter compiles three times as fast. Later jaxlibs abort on its name.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# A device may wait in several collectives at once, a thread in each. With no more threads
# than devices (XLA's choice on a small machine) all of them end up waiting, for ever.
os.environ.setdefault("PJRT_NPROC", "32")
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "alignax-tests"
    ),
)
# The Python traceback of every operation is written into what is lowered, for no reader.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402 the flags above are read when the backend starts

jax.config.update("jax_platforms", "cpu")  # a plug-in may have imported jax already
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)

import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


def modules_with_shapes() -> list[str]:
    """The modules of alignax that annotate shapes of arrays."""
    root = pathlib.Path(__file__).parents[1]
    found = []
    for path in sorted((root / "alignax").rglob("*.py")):
        if "from jaxtyping import" in path.read_text():
            parts = path.relative_to(root).with_suffix("").parts
            found.append(".".join(p for p in parts if p != "__init__"))
    return found


# Annotations are checked where they state shapes. Elsewhere mypy has checked them, and each
# function, also one within a function at each call, would take milliseconds to decorate.
jaxtyping.install_import_hook(
    modules_with_shapes(),
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from alignax.batch import LM, Batch, from_groups  # noqa: E402
from alignax.models import transformer  # noqa: E402
from alignax.models.transformer import ModelConfig  # noqa: E402


def pytest_sessionstart():
    devices = jax.devices()
    assert len(devices) == 8, f"wanted 8 fake CPU devices, there are {devices}"


def pytest_collection_finish():
    """Garbage is collected seldom: every pass reads all modules, and jax's caches too."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A signal that a test sends to itself ends no slow worker of the tests."""
    from alignax.runs import preemption

    monkeypatch.setattr(preemption, "PATIENCE", 3600.0)


@pytest.fixture
def signal_handlers():
    """What SIGTERM and SIGINT do is put back after the test."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def optimised():
    """What compiles during the test is optimised as in production (see FLAGS, though).

    Only for functions that the test itself jits: a module-level jitted function may
    have been compiled by another test, for the same shapes, without optimisations.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Odd sizes on purpose: V is prime, head_dim is not D / H, two queries share a key."""
    return ModelConfig(
        vocab_size=37, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_width=24, max_length=64,
    )  # fmt: skip


def random_lm(config: ModelConfig, seed: int = 0) -> LM:
    """An LM in which every parameter matters: norms, biases and heads are random too.

    Drawn by numpy from the shapes alone, so that nothing is compiled.
    """
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        mean = path[-1].key == "scale" and not config.norm_offset
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return LM(config, jax.tree_util.tree_map_with_path(one, shapes))


@pytest.fixture(scope="session")
def make_lm():
    """make_lm(config, seed) -> LM with every parameter random."""
    return random_lm


@pytest.fixture(scope="session")
def tiny_lm(tiny_config) -> LM:
    return random_lm(tiny_config)


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(B, G, T, seed, vocab=37) -> Batch, ragged prompts and responses."""

    def make(b: int = 4, g: int = 2, t: int = 16, seed: int = 0, vocab: int = 37):
        rng = np.random.default_rng(seed)

        def ids(low, high):
            return rng.integers(0, vocab, rng.integers(low, high + 1)).tolist()

        prompts = [ids(1, t // 2 - 1) for _ in range(b)]
        responses = [[ids(1, t // 2) for _ in range(g)] for _ in range(b)]
        feedback = [[float(g - 1 - j) for j in range(g)] for _ in range(b)]
        batch = from_groups(prompts, responses, length=t, feedback=feedback)
        return Batch(*(x if x is None else jnp.asarray(x) for x in batch))

    return make


@pytest.fixture(scope="session", params=[(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)],
                ids=lambda shape: "x".join(map(str, shape)))  # fmt: skip
def mesh(request):
    """Every mesh shape that the suite promises to agree with one device."""
    from alignax.models.sharding import make_mesh

    return make_mesh(request.param)

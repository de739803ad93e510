"""The smallest run there is, and plug-ins that break it: shared by the tests of runs.

Found by dotted names (`c.loss.name = "tiny.slow_dpo"`), as research outside this
repository would be.
"""

import os
import pathlib
import subprocess
import sys
import time
import zipfile

import jax

from alignax.configs import common, generate
from alignax.data import synthetic
from alignax.losses import dpo

ROOT = pathlib.Path(__file__).parents[1]
PAUSE = "ALIGNAX_TEST_PAUSE"  # seconds that `slow_dpo` waits in every step
NEEDS = dpo.NEEDS  # of the losses below
PROMPTS = [
    "Say a word",
    "Two?",
    "A prompt that is longer than the others",
    "é",
    "Five",
]


def config(kind: str = "sft", **changes):
    """Six steps of a one-layer model on 32 generated examples; one shape, one compile."""
    c = common.get_config()
    c.num_steps, c.batch_size, c.length, c.buckets = 6, 4, 72, (72,)
    c.tokenizer = "bytes"
    c.model.sizes = dict(
        width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
        max_length=128,
    )  # fmt: skip
    c.data = dict(name="synthetic", split="train", kind=kind, size=32, seed=0)
    c.loss = {"name": "sft", "reduction": "token"}
    if kind == "pairs":
        c.loss = {"name": "dpo", "beta": 0.1}
        c.lms = {"ref": "init"}
    c.optim.lr = 1e-2
    c.checkpoint.asynchronous = False
    c.plots = False
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def to_respond(folder: pathlib.Path, variant: str = "", lines=PROMPTS, **changes):
    """A config that answers a file of these lines, six tokens twice each."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n")
    c = generate.get_config(f"{variant},smoke" if variant else "smoke")
    c.model.sizes = config().model.sizes
    c.prompts = {"name": "prompts", "path": str(path), "size": 0}
    c.batch_size, c.generate.max_new, c.generate.group = 2, 6, 2
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def family(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder of a tokenizer with the chat template of a family (tests/golden)."""
    path = folder / name
    with zipfile.ZipFile(ROOT / "tests/golden/templates" / f"{name}.zip") as packed:
        packed.extractall(path)
    return path


def environment(**more) -> dict[str, str]:
    """Of a subprocess: one device, and the repository and this file importable.

    It compiles as quickly, and optimises as little, as the tests themselves.
    """
    env = {k: v for k, v in os.environ.items() if k != PAUSE}
    flags = os.environ.get("XLA_FLAGS", "").split()
    env["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    # Tests start many processes that compile the same small programs.
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return env | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | cache | more


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "alignax.main", *map(str, arguments)]


def main(*arguments, **more) -> subprocess.CompletedProcess:
    """Runs the entry point to its end."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(**more), text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip


def _wait(_):
    time.sleep(float(os.environ.get(PAUSE, 0)))


def slow_dpo(policy, batch, *, beta: float = 0.1):
    """DPO in steps that a test has time to interrupt."""
    jax.debug.callback(_wait, policy.logps[0, 0, 0])
    return dpo.loss(policy, batch, beta=beta)


def nan_dpo(policy, batch, *, beta: float = 0.1):
    """DPO that is nan where an example's feedback is."""
    value, metrics = dpo.loss(policy, batch, beta=beta)
    return value + 0.0 * batch.feedback.sum(-1), metrics


def poisoned(*, split: str, size: int = 32, at: int = 5):
    """Generated pairs of which one has a feedback of nan: `nan_dpo` stumbles over it."""
    rows = list(synthetic.examples(split=split, kind="pairs", size=size))
    rows[at] = rows[at]._replace(feedback=(float("nan"), 0.0))
    return rows


SCRIPT: list = []  # what `scripted` does next: a number to report, or a call


def scripted(
    lm, lms, data, *, key, tokenizer, generate, score, batch_size: int, length: int
):
    """An evaluation whose result the test decides."""
    value = SCRIPT.pop(0)
    return {"value": value() if callable(value) else value}

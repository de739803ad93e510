"""Writes run_*.zip: folders of runs that stopped halfway, and how each went on.

  python tests/golden/make_runs.py        from the root of the repository

They were written by commit 2628565, before the package was divided into folders, and are
the proof that a checkpoint outlives the code around it. Do not write them again, unless a
release says that older runs cannot be resumed.

  dpo   pairs in packed rows, with an average of the parameters
  rl    CTRL: stopped inside a rollout, whose responses and reference rewards were kept
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile

STOPPED, NUM_STEPS = 3, 6
HERE = pathlib.Path(__file__).resolve().parent


def configs() -> dict:
    """The configs of the runs by name."""
    import tiny

    saving = {
        "num_steps": NUM_STEPS,
        "checkpoint.every": STOPPED,
        "model.path": "start",
    }
    dpo = tiny.config("pairs", **saving, average=0.9)
    rl = tiny.config("sft", **saving, length=24)
    with rl.unlocked():
        rl.loss = {"name": "policy_gradient"}
        rl.lms = {"ref": "init"}
        rl.shaping = {"ctrl": {}, "kl": {"beta": 0.1}, "rloo": {}}
        rl.rollout.reward = {
            "name": "ensemble",
            "members": {
                "letters": {"name": "constraints", "pattern": "[a-z]"},
                "words": {"name": "constraints", "min_words": 2, "pattern": "[A-Z0-9]"},
            },
        }
        rl.rollout.update(max_new=6, batches=2, epochs=2, reference_samples=8)
    return {"dpo": dpo, "rl": rl}


def main() -> None:
    import jax

    from alignax.batch import LM
    from alignax.models import save, transformer
    from alignax.training.loop import train

    # Weights that are drawn from a seed differ in the last bit from one compiler to
    # another; these are read.
    model = transformer.ModelConfig(
        vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_width=16, max_length=128,
    )  # fmt: skip
    start = LM(model, transformer.init(model, jax.random.key(0)))
    for name, config in configs().items():
        with tempfile.TemporaryDirectory() as scratch:
            workdir = pathlib.Path(scratch) / "run"
            workdir.mkdir()
            save.save(start, workdir / "start")
            os.chdir(workdir)
            train(config, ".")
            rows = [json.loads(r) for r in (workdir / "metrics.jsonl").open()]
            shutil.rmtree(workdir / "checkpoints" / str(NUM_STEPS))
            (workdir / "after.json").write_text(
                json.dumps([r for r in rows if r["step"] > STOPPED], indent=1)
            )
            kept = [json.dumps(r) + "\n" for r in rows if r["step"] <= STOPPED]
            (workdir / "metrics.jsonl").write_text("".join(kept))
            for path in workdir.glob("events.*"):  # named after the machine
                path.unlink()
            os.chdir(HERE)
            shutil.make_archive(str(HERE / f"run_{name}"), "zip", workdir)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    main()

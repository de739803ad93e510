"""A config of several runs, each in its own folder, that read one another's weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

from alignax.batch import Metrics
from alignax.reports import curves, tables
from alignax.reports.metrics import read
from alignax.runs import checkpoint, model_paths


def check(stages: Any) -> None:
    """Raises ValueError for a stage that reads the weights of no stage before it."""
    before: list[str] = []
    for name, stage in stages.items():
        paths = {"model.path": stage.model.path}
        paths |= {f"lms.{lm}": path for lm, path in stage.lms.items()}
        for key, path in paths.items():
            of = model_paths.stage_of(str(path))
            if of is not None and of not in before:
                raise ValueError(
                    f"stages.{name}.{key} is {path!r}, and the stages before it are "
                    f"{before}"
                )
        before.append(name)


def lineage(config, stages: Any) -> Iterator[Any]:
    """A stage, the stage whose weights it starts from, and so on."""
    yield config
    while (name := model_paths.stage_of(config.model.path)) is not None:
        config = stages[name]
        yield config


def run_stages(config, workdir: str, train):
    """Trains the stages of a config in order; 'stage:NAME' is the folder of one.

    A stage is a whole config: nothing beside `stages` is read.

    Returns:
      The last stage's TrainState.
    """
    check(config.stages)
    state, folder = None, checkpoint.absolute(workdir)
    for name, stage in config.stages.items():
        stage = stage.copy_and_resolve_references()
        stage.model.path = model_paths.of_stage(stage.model.path, folder)
        for lm, path in stage.lms.items():
            stage.lms[lm] = model_paths.of_stage(path, folder)
        print(f"\n== {name} ==", flush=True)
        state = train(stage, str(folder / name))
    results: Metrics = {}
    samples = []
    for name in config.stages:
        merged: Metrics = {}
        for row in read(folder / name):
            merged |= {k: v for k, v in row.items() if k.startswith("eval/")}
        results |= {f"{name}/{k.removeprefix('eval/')}": v for k, v in merged.items()}
        with contextlib.suppress(FileNotFoundError):
            samples.append(f"# {name}\n\n" + (folder / name / "samples.md").read_text())
    print(f"\n== results ==\n{tables.table(results)}", flush=True)
    (folder / "samples.md").write_text(
        "\n".join(s for s in samples if s.count("\n") > 2)
    )
    for path in curves.plot(str(folder)):
        print(f"drew {path}", flush=True)
    return state

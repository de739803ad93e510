"""Does a training step fit, and what does it cost: compiled for chips that are not at hand.

  python -m alignax.preflight --config configs/dpo_llama3_8b.py --topology v5e:8x8

The step that training runs is lowered with shapes alone and compiled by the TPU compiler
(`pip install alignax[preflight]`). No chip, weights, data or network are needed. The exit
code is 0 if the step fits; 1 if it does not, and changes that would make it fit are printed;
2 after an error. For GPUs (h100:8) the numbers are estimates by XLA's compiler for CPUs.
The programs of rollouts and evaluations are not checked.
"""

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from alignax.preflight import chips, compiled, footprint
from alignax.preflight.chips import GIB, Topology
from alignax.preflight.footprint import Program, Report
from alignax.preflight.lowering import UNKNOWN, Shape
from alignax.training import ranges


def preflight(
    config, name: str, data: Shape = UNKNOWN, *, sweep: bool = False, tries: int = 2
) -> int:
    """Prints memory and costs of a config's step on a slice.

    Args:
      config: a ConfigDict.
      name: of the topology, as `chips.parse` reads it.
      data: sizes that depend on the data.
      sweep: try every mesh and print a table instead.
      tries: how many remedies are compiled if the step does not fit.

    Returns:
      0 if it fits (in a sweep: on some mesh), else 1.

    Raises:
      ValueError, OSError, ImportError: the step cannot be compiled.
    """
    if config.get("stages"):
        raise ValueError("a config with stages has several steps: preflight each stage")
    ranges.check(config)
    topology = chips.parse(name)
    devices = chips.devices(topology)
    if sweep:
        return _sweep(config, topology, devices, data)
    report = footprint.inspect(config, topology, devices, data)
    print(describe(report), flush=True)
    if not report.fits:
        print("\nwhat would make it fit:", flush=True)
        for line in _remedies(config, report, devices, data, tries):
            print(f"  {line}", flush=True)
    return 0 if report.fits else 1


def describe(report: Report) -> str:
    """A report as text."""
    chip, topology = report.topology.chip, report.topology
    b, g, t = report.batch
    mesh = " x ".join(f"{k}={v}" for k, v in report.mesh.items())
    lines = [
        f"{report.parameters:,} parameters on {topology.name}, {mesh}; a step of "
        f"{b} prompts x {g} responses x {t} tokens, {report.tokens:,} of them computed",
        *(f"note: {note}" for note in report.notes),
    ]
    if not topology.is_tpu:
        lines.append(
            "ESTIMATE: compiled by XLA for CPUs, whose temporaries differ from a GPU's"
        )
    held = ", ".join(f"{k} {size(v)}" for k, v in report.held.items())
    lines.append(f"held on a chip between steps: {held}")
    host = report.host
    lines.append(
        f"held by a host (of {host.chips} chips) besides: {size(host.reading)} while "
        f"weights are read, {size(host.saving)} while a checkpoint is written"
    )
    for program in report.programs:
        lines += ["", *_program(program)]
    lines += ["", *_costs(report)]
    verdict = "fits" if report.fits else "does NOT fit"
    share = f"{size(report.peak)} of {size(chip.memory)} per chip"
    lines.append(f"verdict: {verdict}, {share} ({report.peak / chip.memory:.0%})")
    return "\n".join(lines)


def _program(p: Program) -> list[str]:
    title = f"{p.name} (module {p.fingerprint}, compiled in {p.seconds:.0f} s)"
    if p.memory is None:
        return [f"{title}: refused by the compiler", f"  {p.refused.strip()[:2000]}"]
    m = p.memory
    lines = [
        f"{title}: peak {size(m.peak + p.elsewhere)} per chip",
        f"  arguments {size(m.arguments)}, temporaries {size(m.temporaries)}, outputs "
        f"{size(m.outputs)} ({size(m.aliased)} in place of arguments), code "
        f"{size(m.code)}, held besides {size(p.elsewhere)}",
        "  largest buffers (not all at once):",
    ]
    for x in p.buffers:
        lines.append(
            f"    {size(x.size):>10}  {x.shape} x {x.makers}  {', '.join(x.sources[:2])}"
        )
    lines.append("  collectives, per chip:")
    for kind, (count, total) in compiled.by_kind(p.collectives).items():
        lines.append(f"    {size(total):>10}  {kind} x {count}")
    for c in p.collectives[:4]:
        more = "" if c.bounded else " or more, depending on the data"
        lines.append(
            f"      {size(c.size)} x {c.times}{more}  {c.kind} of {c.group}  {c.source}"
        )
    return lines


def _costs(report: Report) -> list[str]:
    times, cost = report.times, report.costs
    bound = max(times, key=lambda k: times[k])
    parts = ", ".join(f"{k} {v:.3g} s" for k, v in times.items())
    rate = report.tokens / times[bound] / math.prod(report.mesh.values())
    return [
        f"FLOPs per token: {cost.model:.3g} of the model, {cost.computed:.3g} computed",
        f"a step takes at least {times[bound]:.3g} s, bound by {bound} ({parts}); "
        f"{rate:,.0f} tokens/s per chip, padding included",
    ]


def size(number: float) -> str:
    """Bytes with a binary unit, such as '1.50 GiB'."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}" if number < math.inf else "too much"
    return f"{number:.0f} B"


def _remedies(
    config, report: Report, devices, data: Shape, tries: int
) -> Iterator[str]:
    """One line per remedy: compiled while tries are left, then estimated."""
    limit = report.topology.chip.memory
    for name, overrides in remedies(config, tuple(report.mesh.values())):
        flags = " ".join(
            shlex.quote(f"--config.{k}={v}".replace(" ", ""))
            for k, v in overrides.items()
        )
        attempt = changed(config, overrides)
        try:
            if tries > 0:
                tries -= 1
                found = footprint.inspect(attempt, report.topology, devices, data)
                word = "fits" if found.fits else "does not fit"
                yield f"{name}: {flags} -> tried: {word}, {size(found.peak)}"
                if found.fits:
                    tries = 0
                continue
            peak = footprint.estimate(config, attempt, report, devices, data)
            word = "may fit" if peak <= limit else "would not fit"
            yield f"{name}: {flags} -> estimated, not compiled: {word}, {size(peak)}"
        except ValueError as error:
            yield f"{name}: {flags} -> not possible: {error}"


def _sweep(config, topology: Topology, devices: Sequence[Any], data: Shape) -> int:
    """Prints a table with a row for every mesh, each as soon as it is compiled."""
    possible = meshes(config, len(devices))
    if not possible:
        raise ValueError(
            f"no mesh of {len(devices)} devices divides batch_size={config.batch_size} "
            f"over accumulate={config.accumulate} micro-batches"
        )
    note = "" if topology.is_tpu else ", estimated by compiling for CPUs"
    print(f"memory per chip of {topology.name}: {size(topology.chip.memory)}{note}\n")
    print(
        "| data, fsdp, model | fits | peak | temporaries | at least | bound by | sent |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    some = False
    for mesh in possible:
        attempt = changed(config, {"mesh": mesh})
        found = footprint.inspect(attempt, topology, devices, data)
        some = some or found.fits
        temporaries = max(
            p.memory.temporaries if p.memory else 0 for p in found.programs
        )
        times = found.times
        bound = max(times, key=lambda k: times[k])
        sent = sum(compiled.wire(c) for p in found.programs for c in p.collectives)
        cells = [
            ", ".join(map(str, mesh)), "yes" if found.fits else "no", size(found.peak),
            size(temporaries) if temporaries else "refused",
            f"{times[bound]:.3g} s", bound, size(sent),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0 if some else 1


def remedies(config, mesh: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of the config that need less memory, the cheapest first."""
    data, fsdp, model = mesh
    for remat in ("elementwise", "block"):
        if config.model.remat not in ("block", remat):
            yield "remat", {"model.remat": remat}
    if data > 1:
        yield "mesh", {"mesh": (1, data * fsdp, model)}
    if config.batch_size % (data * fsdp * config.accumulate * 2) == 0:
        yield "micro-batch", {"accumulate": config.accumulate * 2}
    if fsdp % 2 == 0:
        yield "mesh", {"mesh": (data, fsdp // 2, model * 2)}
    if config.lms.get("ref") and not config.reference_cache:
        yield "cached reference", {"reference_cache": "runs/reference"}
    if not config.lora.rank:
        yield "LoRA", {"lora.rank": 16}


def changed(config, overrides: dict[str, Any]) -> Any:
    """A copy of a config with flat overrides."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def meshes(config, devices: int) -> list[tuple[int, int, int]]:
    """Every mesh (data, fsdp, model) of all devices that the batch divides over.

    'model' divides the number of key-value heads: else attention would be replicated.
    """
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    heads = int(config.model.sizes.get("num_kv_heads", devices))
    return [
        (devices // (fsdp * model), fsdp, model)
        for model, fsdp in itertools.product(sizes, reversed(sizes))
        if devices % (fsdp * model) == 0
        and heads % model == 0
        and config.batch_size % (devices // model * config.accumulate) == 0
    ]

"""Memory, collectives and FLOPs of one training step on a chip.

Memory and collectives are read from the same compiled programs that training runs. FLOPs
are computed from the sizes of the model, since XLA counts the body of a loop once.
"""

import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from alignax.models import sharding, transformer
from alignax.preflight import compiled, lowering
from alignax.preflight.chips import Topology
from alignax.preflight.compiled import Buffer, Collective, Memory
from alignax.preflight.lowering import UNKNOWN, Shape
from alignax.reports.metrics import flops_per_token, peak_flops

SHOWN = 8  # buffers of a program
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """One compiled program of the step; `memory` is None if it did not compile."""

    name: str
    fingerprint: str
    seconds: float  # of compilation
    memory: Memory | None
    elsewhere: int  # bytes on a chip that are no argument of the program
    buffers: Sequence[Buffer]
    collectives: Sequence[Collective]
    refused: str  # message of the compiler that ran out of memory

    @property
    def peak(self) -> float:
        """Bytes on a chip while it runs; from the message, or inf, if it did not compile."""
        if self.memory is not None:
            return self.memory.peak + self.elsewhere
        found = re.findall(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", self.refused)  # fmt: skip
        sizes = [float(a or c) * UNITS[b or d] for a, b, c, d in found]
        return max(sizes, default=math.inf)


class Costs(NamedTuple):
    """FLOPs of matrix products per token of a row."""

    model: float  # forward and backward, without recomputation
    computed: float  # with recomputation in the backward pass


class Report(NamedTuple):
    """The results for one config on one mesh."""

    topology: Topology
    mesh: dict[str, int]
    parameters: int
    batch: tuple[int, ...]  # B, G, T
    tokens: int  # computed in a step, padding included
    held: dict[str, int]  # bytes on a chip between two steps
    gradient: int  # bytes on a chip of the trained parameters' gradient
    host: lowering.OfHost
    programs: Sequence[Program]
    costs: Costs
    notes: Sequence[str]

    @property
    def peak(self) -> float:
        return max(p.peak for p in self.programs)

    @property
    def fits(self) -> bool:
        compiled = all(p.memory for p in self.programs)
        return compiled and self.peak <= self.topology.chip.memory

    @property
    def times(self) -> dict[str, float]:
        """Lower bounds of the seconds per step: each resource at its full rate."""
        chip, size = self.topology.chip, math.prod(self.mesh.values())
        peak = peak_flops(chip.kind) or math.nan
        moved = sum(
            p.memory.arguments + p.memory.outputs + 2 * p.memory.temporaries
            for p in self.programs
            if p.memory
        )
        sent = sum(compiled.wire(c) for p in self.programs for c in p.collectives)
        return {
            "compute": self.costs.computed * self.tokens / (size * peak),
            "memory": moved / chip.bandwidth,
            "network": sent / chip.link,
        }


def inspect(
    config, topology: Topology, devices: Sequence[Any], data: Shape = UNKNOWN
) -> Report:
    """Lowers and compiles the step of a config for a slice.

    Args:
      config: a ConfigDict; its mesh must use all devices.
      topology: from `chips.parse`.
      devices: from `chips.devices`.
      data: sizes that depend on the data.

    Raises:
      ValueError, OSError: a config that cannot run on these devices.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    if mesh.size != len(devices):
        raise ValueError(
            f"mesh {tuple(config.mesh)} uses {mesh.size} of {len(devices)} devices of "
            f"{topology.name}: try '--config.mesh=(1,{len(devices)},1)'"
        )
    plan = lowering.plan(config, mesh, data)
    trees = {"state": plan.state, "frozen LMs": plan.lms, "batch": plan.batch}
    held = {k: lowering.held(tree) for k, tree in trees.items()}
    programs = []
    with jax.default_device(devices[0]):  # kernels are chosen by the default device
        for name, lower in plan.programs.items():
            programs.append(_compile(name, lower(), sum(held.values())))
    return Report(
        topology, dict(mesh.shape), transformer.num_params(plan.policy.params),
        plan.batch.tokens.shape,
        computed(plan).size, held, lowering.gradient(config, plan),
        lowering.of_host(plan, lowering.first_host(mesh)), programs,
        costs(plan), plan.notes,
    )  # fmt: skip


def _compile(name: str, lowered: Any, held: int) -> Program:
    start = time.monotonic()
    mark = compiled.fingerprint(lowered)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.monotonic() - start
        return Program(name, mark, seconds, None, 0, (), (), str(error))
    seconds = time.monotonic() - start
    module = compiled.Module(program.as_text())
    given = [x for x in module.computations[module.entry] if x.kind == "parameter"]
    read = sum(compiled.shape_bytes(x.shape) for x in given)
    return Program(
        name, mark, seconds, compiled.memory(program), max(0, held - read),
        compiled.buffers(module)[:SHOWN], compiled.collectives(module), "",
    )  # fmt: skip


def computed(plan: lowering.Plan) -> Any:
    """The token ids that a step computes on: packed rows, or those of the batch."""
    return plan.batch.tokens if plan.batch.layout is None else plan.batch.layout.tokens


def costs(plan: lowering.Plan) -> Costs:
    """FLOPs per token: forward and backward of the policy, forward of the frozen LMs."""
    rows = computed(plan)
    # tokens of a prompt with its responses, or of one response if each has its own row
    group = min(rows.size / plan.batch.tokens.shape[0], rows.shape[-1])

    def matmuls(lm) -> int:
        """Parameters in matrix products; the head counts as if all were scored."""
        c = lm.config
        return transformer.num_params(lm.params["blocks"]) + c.vocab_size * c.width

    def attention(c) -> float:
        """Of the forward pass, in which later columns and other prompts are skipped."""
        return 4.0 * c.num_layers * c.num_heads * c.head_dim * (group + 1) / 2

    c, trained = plan.policy.config, transformer.num_params(plan.state.params)
    every = matmuls(plan.policy)
    frozen = max(0, transformer.num_params(plan.policy.params) - trained)
    model = flops_per_token(min(every, trained), "train", frozen=min(every, frozen))
    model += 3 * attention(c)
    again = 2.0 * c.vocab_size * c.width + attention(c)  # of the head, and of attention
    if c.remat == "block":
        again += 2.0 * (every - c.vocab_size * c.width)
    if "reference" in plan.programs:
        frozen_lms = [lm for name, lm in plan.lms.items() if name != "base"]
        for lm in [*frozen_lms, *[plan.policy] * plan.moving]:
            model += flops_per_token(matmuls(lm), "forward") + attention(lm.config)
    return Costs(model, model + again)


def estimate(
    config, changed, report: Report, devices: Sequence[Any], data: Shape = UNKNOWN
) -> float:
    """Estimates the bytes on a chip for a changed config, without compiling it.

    The state, the frozen LMs, the batch and the gradient are computed from their shapes. The
    other temporaries are assumed to be those of `report`, in proportion to the size of a
    micro-batch.
    """
    mesh = sharding.make_mesh(changed.mesh, devices)
    plan = lowering.plan(changed, mesh, data)
    held = sum(map(lowering.held, (plan.state, plan.lms, plan.batch)))
    others = report.peak - sum(report.held.values()) - report.gradient
    fewer = config.accumulate / changed.accumulate
    return held + lowering.gradient(changed, plan) + max(0.0, others) * fewer

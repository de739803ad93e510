"""The chips that `preflight` knows: memory, bandwidth and topology.

Bandwidths are the vendors' numbers. The memory of a TPU is what its compiler allows a
program (as in its message when a program is too large). The memory of a GPU is the share of
the card that jax takes by default (see XLA_PYTHON_CLIENT_MEM_FRACTION).
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB, GPU_SHARE = 2**30, 0.75


class Chip(NamedTuple):
    """One device, as jax counts devices."""

    kind: str  # jax's `device_kind`: `metrics.peak_flops` has its FLOP/s
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes/s from and to that memory
    link: float  # bytes/s to its neighbours, one way, over all links
    source: str


TPU = "https://cloud.google.com/tpu/docs/"
GPU = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1228e9, 300e9, TPU + "v4"),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 200e9, TPU + "v5e"),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 600e9, TPU + "v5p"),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 400e9, TPU + "v6e"),
    "a100": Chip("A100", GPU_SHARE * 80 * GIB, 2039e9, 300e9, GPU + "a100"),
    "h100": Chip("H100", GPU_SHARE * 80 * GIB, 3350e9, 450e9, GPU + "h100"),
    "h200": Chip("H200", GPU_SHARE * 141 * GIB, 4800e9, 450e9, GPU + "h200"),
}
ALONE = {  # makes libtpu compile without chips, without other hosts, and without logs
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
}  # fmt: skip


class Topology(NamedTuple):
    """A slice of TPU chips, or GPUs of one host."""

    name: str  # as given, 'v5e:8x8'
    generation: str  # a key of CHIPS
    shape: tuple[int, ...]  # chips along each dimension of the slice; number of GPUs

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def is_tpu(self) -> bool:
        return self.chip.kind.startswith("TPU")


def parse(name: str) -> Topology:
    """'v5e:8x8', 'v5p:4x4x4' or 'h100:8'.

    Raises:
      ValueError: another form, or a chip that is not in the table.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not found or found.group(1) not in CHIPS:
        raise ValueError(
            f"unknown topology {name!r}: expected CHIP:SHAPE, such as v5e:8x8, v5p:4x4x4 "
            f"or h100:8; the chips are {', '.join(CHIPS)}"
        )
    shape = tuple(map(int, found.group(2).split("x")))
    topology = Topology(name, found.group(1), shape)
    want = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}.get(topology.generation, 1)
    if len(shape) != want:
        example = "x".join(["4"] * want)
        raise ValueError(
            f"topology {name!r} has {len(shape)} dimensions, {topology.generation} has "
            f"{want}: {topology.generation}:{example}"
        )
    return topology


def devices(topology: Topology) -> Sequence[Any]:
    """Devices for a mesh: a slice as libtpu describes it, or CPU devices in place of GPUs.

    No TPU is needed; one that is there is not used.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: the slice does not exist, or there are fewer CPU devices than GPUs.
    """
    if not topology.is_tpu:
        there = jax.devices("cpu")
        if len(there) < math.prod(topology.shape):
            raise ValueError(
                f"{topology.name} needs {math.prod(topology.shape)} CPU devices, there "
                f"are {len(there)}: set jax_num_cpu_devices before jax is used"
            )
        return there[: math.prod(topology.shape)]
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"{topology.name} needs the TPU compiler: pip install 'alignax[preflight]'"
        )
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    more: dict[str, Any] = {}
    if math.prod(topology.shape) == 1:  # else a slice is made of whole hosts
        more["chips_per_host_bounds"] = [1, 1, 1]
    if topology.generation == "v4":  # as on a TPU VM: both cores are one device
        more["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no slice {topology.name!r}: {error}") from error
    return found.devices

"""Parses a compiled XLA program: memory, large buffers, collectives.

XLA's memory report has only the sums. The buffers, the source lines that they come from and
the collectives are in the text of the optimised module, which is parsed here. It differs
a little between the TPU and the CPU compiler; both are read.
"""

import functools
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# Opcodes whose result is a buffer that another instruction allocated.
VIEWS = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "optimization-barrier", "constant", "dynamic-update-slice", "after-all", "call",
}  # fmt: skip
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Memory(NamedTuple):
    """Bytes on one device, padding included."""

    arguments: int
    outputs: int
    aliased: int  # part of the outputs that reuses donated arguments
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """Bytes that the program needs while it runs, with its arguments."""
        held = self.arguments + self.outputs - self.aliased
        return held + self.temporaries + self.code


class Buffer(NamedTuple):
    """Results of one shape in the device's main memory."""

    shape: str  # 'f32[4096,128256]'
    size: int  # bytes of one
    makers: int  # instructions that allocate one; they need not be alive at once
    sources: tuple[str, ...]  # 'alignax/logprob.py:320', the most frequent first


class Collective(NamedTuple):
    """Collectives of one kind, group size and source line, per device."""

    kind: str
    group: int  # devices that take part; 0 if unknown
    size: int  # bytes of the larger of operand and result
    times: int  # runs in one call of the program
    bounded: bool  # False: in a loop whose length depends on the data, counted once
    source: str

    @property
    def total(self) -> int:
        return self.size * self.times


class Instruction(NamedTuple):
    name: str
    kind: str  # opcode
    shape: str
    text: str  # the rest of the line after the opcode


def fingerprint(lowered: Any) -> str:
    """A hash of a lowered program before it is compiled for a device."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def memory(compiled: Any) -> Memory:
    """XLA's report of a compiled program."""
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return Memory(*(int(getattr(found, f"{n}_size_in_bytes")) for n in names))


def shape_bytes(shape: str, *, space: int | None = None) -> int:
    """Bytes of a shape in text form; a tuple is the sum of its parts.

    Args:
      shape: such as 'f32[4,128]{1,0}'.
      space: counts only the parts in that memory space; None counts all. Space 0 is a
        device's main memory; on a TPU S(1) is on-chip memory.
    """
    total = 0
    for kind, dims, layout in SHAPE.findall(shape):
        found = re.search(r"S\((\d+)\)", layout)
        if space is None or space == int(found.group(1) if found else 0):
            bits = BITS.get(kind) or int((re.findall(r"\d+", kind) or [0])[0])
            total += -(
                -bits * math.prod(map(int, dims.split(",") if dims else [])) // 8
            )
    return total


class Module:
    """The computations of an optimised module, and how often each one runs."""

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.fused: set[str] = set()
        body: list[Instruction] = []
        for line in text.splitlines():
            if not line.startswith(" "):
                if header := HEADER.match(line):
                    body = self.computations.setdefault(header.group(1), [])
                    if line.startswith("ENTRY"):
                        self.entry = header.group(1)
            elif " = " in line:
                body.append(_instruction(line))
        for body in self.computations.values():
            for one in body:
                if one.kind == "fusion":
                    self.fused.update(called(one))

    @functools.cached_property
    def runs(self) -> dict[str, tuple[int, bool]]:
        """{computation: (runs in one call of the program, whether that is exact)}."""
        times: dict[str, tuple[int, bool]] = defaultdict(lambda: (0, True))
        times[self.entry] = (1, True)
        # In the text a computation comes before those that call it.
        for name in reversed(self.computations):
            outer, certain = times[name]
            for one in self.computations[name] if outer else ():
                trips: int | None = 1
                if one.kind == "while":
                    trips = self.trips(one)
                for inner in called(one):
                    before, sure = times[inner]
                    sure = sure and certain and trips is not None
                    times[inner] = (before + outer * (trips or 1), sure)
        return dict(times)

    def trips(self, loop: Instruction) -> int | None:
        """Trip count of a loop; None if it is decided at run time."""
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(found.group(1))
        name = re.search(r"condition=%?([\w.\-]+)", loop.text)
        body = self.computations.get(name.group(1) if name else "", [])
        constants = {
            x.name: int(n.group(1))
            for x in body
            if x.kind == "constant" and (n := re.match(r"\((\d+)\)", x.text))
        }
        # `lax.scan` and `fori_loop` count from 0 in steps of 1
        if body and body[-1].kind == "compare" and "direction=LT" in body[-1].text:
            return constants.get(operands(body[-1])[-1])
        return None

    @functools.cached_property
    def frames(self) -> dict[str, str]:
        """{stack frame: 'file:line'} of the innermost line inside this package."""
        tables: dict[str, dict[str, str]] = defaultdict(dict)
        table = ""
        for line in self.text.splitlines():
            if HEADER.match(line):
                break
            if re.fullmatch(r"[A-Za-z]+", line):
                table = line
            elif found := re.match(r"(\d+) (.*)", line):
                tables[table][found.group(1)] = found.group(2)

        def field(text, name):
            found = re.search(rf"\b{name}=(\d+)", text)
            return found.group(1) if found else ""

        def where(frame, depth=0):
            found = tables["StackFrames"].get(frame, "")
            place = tables["FileLocations"].get(field(found, "file_location_id"), "")
            path = tables["FileNames"].get(field(place, "file_name_id"), "").strip('"')
            above = field(found, "parent_frame_id")
            if own := _own(path):
                return f"{own}:{field(place, 'line')}"
            return where(above, depth + 1) if above != frame and depth < 99 else ""

        return {frame: where(frame) for frame in tables["StackFrames"]}

    def source(self, one: Instruction) -> str:
        """'file:line' of an instruction, or its `op_name`; '' if neither is known."""
        frame = re.search(r"stack_frame_id=(\d+)", one.text)
        if frame and self.frames.get(frame.group(1)):
            return self.frames[frame.group(1)]
        place = re.search(r'source_file="([^"]*)" source_line=(\d+)', one.text)
        if place and _own(place.group(1)):
            return f"{_own(place.group(1))}:{place.group(2)}"
        name = re.search(r'op_name="([^"]*)"', one.text)
        return name.group(1).split("/", 1)[-1] if name else ""


def buffers(module: Module, *, least: int = 2**20) -> list[Buffer]:
    """Large results in main memory, the largest first; views of others are left out.

    Args:
      module: the optimised module.
      least: bytes; smaller buffers are left out.
    """
    found: dict[str, list[str]] = defaultdict(list)
    sizes = {}
    for name, body in module.computations.items():
        if name in module.fused or not module.runs.get(name, (0, True))[0]:
            continue
        for one in body:
            if one.kind in VIEWS or one.kind.endswith("-done"):
                continue
            if one.kind.endswith(
                "-start"
            ):  # (operand, result, ...): the operand is there
                continue
            for part in SHAPE.finditer(one.shape):
                size = shape_bytes(part.group(), space=0)
                if size >= least:
                    shape = f"{part.group(1)}[{part.group(2)}]"
                    sizes[shape] = size
                    found[shape].append(module.source(one))
    return sorted(
        (
            Buffer(shape, sizes[shape], len(lines), _frequent(lines))
            for shape, lines in found.items()
        ),
        key=lambda b: -b.size,
    )


def collectives(module: Module) -> list[Collective]:
    """The collectives of one call of a program, the most bytes first.

    A TPU may run one collective in several pieces, each inside a fusion that overlaps it
    with computation, perhaps in an inner loop: pieces of one channel are one collective.
    """
    seen: dict[Any, Collective] = {}
    for name, body in module.computations.items():
        times, bounded = module.runs.get(name, (0, True))
        shapes = {one.name: one.shape for one in body}
        for one in body if times else ():
            kind = one.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            given = sum(shape_bytes(shapes.get(x, "")) for x in operands(one))
            made = shape_bytes(one.shape)
            if one.kind != kind and kind != "all-reduce":  # (operands, results)
                made -= given
            size = max(given, made)
            source = module.source(one)
            found = Collective(kind, _group(one.text), size, times, bounded, source)
            channel = re.findall(r"channel_id=(\d+)", one.text)
            piece = name in module.fused and channel
            key = (kind, channel[0], size) if piece else (name, one.name)
            seen[key] = min(found, seen.get(key, found), key=lambda c: c.times)
    times_of: dict[Collective, int] = Counter()
    for collective in seen.values():
        times_of[collective._replace(times=0)] += collective.times
    merged = [one._replace(times=times) for one, times in times_of.items()]
    return sorted(merged, key=lambda c: -c.total)


def by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (number in one call, bytes)}."""
    out: dict[str, tuple[int, int]] = {}
    for one in found:
        count, size = out.get(one.kind, (0, 0))
        out[one.kind] = (count + one.times, size + one.total)
    return out


def wire(one: Collective) -> float:
    """Bytes that a device sends in a ring; an all-reduce sends everything twice."""
    share = (one.group - 1) / one.group if one.group else 1.0
    return one.total * share * (2 if one.kind == "all-reduce" else 1)


def called(one: Instruction) -> list[str]:
    """Names of the computations that an instruction runs."""
    names: list[str] = []
    for found in CALLED.findall(one.text):
        names += re.findall(r"[\w.\-]+", found)
    return names


def operands(one: Instruction) -> list[str]:
    """Names of an instruction's operands."""
    depth, inner = 0, ""
    for c in one.text:
        depth += (c == "(") - (c == ")")
        inner += c
        if not depth:
            break
    return re.findall(r"%([\w.\-]+)", inner) or re.findall(r"([\w.\-]+)[,)]", inner)


def _instruction(line: str) -> Instruction:
    """Parses one line of a computation; a tuple's shape has spaces and parentheses."""
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    depth = end = 0
    while depth or rest[end] != " ":
        depth += (rest[end] in "([{") - (rest[end] in ")]}")
        end += 1
    shape, call = rest[:end], rest[end + 1 :]
    opcode = re.split(r"[^\w\-]", call, maxsplit=1)[0]
    return Instruction(name.lstrip("%"), opcode, shape, call[len(opcode) :])


def _group(text: str) -> int:
    """Devices in one group, from any of the three notations of XLA."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found.group(1).split(","))
    return 0


def _own(path: str) -> str:
    """'alignax/training/step.py' for a path in the package; '' for any other."""
    found = re.search(r"\b(alignax/(?:\w+/)?\w+\.py)$", path)
    return found.group(1) if found else ""


def _frequent(lines: Sequence[str]) -> tuple[str, ...]:
    """Distinct lines, the most frequent first; '' is left out."""
    return tuple(x for x, _ in Counter(filter(None, lines)).most_common())

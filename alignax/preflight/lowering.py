"""Lowers the programs of a config for devices that need not be there.

The functions that start a run are traced instead of called: no weights are drawn, read or
placed, so an 8B model takes no memory. The sizes of the model come from the config, or from
the header of the file at its path.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from alignax import plugin
from alignax.batch import LM, Batch, Layout
from alignax.inputs import layout
from alignax.inputs import plan as batches
from alignax.inputs.annotate import unfilled
from alignax.models import families, gguf, sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.text import tokenizer
from alignax.training import build, checks, loading, on_policy, step
from alignax.training.plugins import has_rollouts


class Shape(NamedTuple):
    """Sizes of a batch that depend on the data.

    0 and None are unknown: the config decides, or else the worst case is assumed.
    """

    group: int = 0  # G, responses per prompt
    tokens: int = 0  # distinct tokens of a prompt and its responses, on average
    packed: tuple[int, int] | None = None  # (R, L) of packed rows, if known from a run


UNKNOWN = Shape()


class Plan(NamedTuple):
    """The trees on the devices of a training run, and the programs of one step.

    Every tree holds shapes with their shardings, and no arrays.
    """

    mesh: Mesh
    policy: LM  # with the frozen base, if adapters are trained
    state: Any
    lms: dict[str, LM]
    batch: Batch
    moving: int  # number of names that mean the policy's average instead of a frozen LM
    programs: dict[str, Callable[[], Any]]  # each lowers one, in the order they run
    notes: tuple[str, ...]  # assumptions


def plan(config, mesh: Mesh, data: Shape = UNKNOWN) -> Plan:
    """Traces one optimiser step of a config with shapes alone.

    Args:
      config: a ConfigDict, with the sizes of its models or their paths.
      mesh: of real, fake or described devices.
      data: sizes that depend on the data.

    Raises:
      ValueError, OSError: the config cannot run on that mesh; the same errors as in
        training.
    """
    checks.check(config)
    sharding.check_batch_size(config.batch_size, config.accumulate, mesh)
    notes: list[str] = []
    config, ids = without_weights(config, notes)
    loss = plugin.load_loss(config)
    made: dict[str, Any] = {}

    def start():
        """The start of `build.build` and `loop.train`, without the data."""
        policy = loading.make_policy(config, ids)
        load = functools.partial(_frozen, policy.config, notes)
        pieces = build.pieces(config, policy, mesh, load=load)
        state = step.init_state(
            pieces.policy.params, pieces.tx, mesh, ema=loss.ema,
            average=checks.keeps_average(config),
        )  # fmt: skip
        made["step"] = step.make_train_step(
            policy.config, pieces.tx, loss, mesh, **build.settings(config, pieces, loss)
        )
        made["moving"] = len(pieces.moving)
        whole = pieces.assemble(state.params, pieces.lms)
        return state, pieces.lms, whole, made["step"].hyper

    state, lms, policy, hyper = jax.eval_shape(start)
    state = _placed(state, mesh)
    lms = {k: LM(lm.config, _placed(lm.params, mesh)) for k, lm in lms.items()}
    policy = LM(policy.config, _placed(policy.params, mesh))
    hyper = _placed(hyper, mesh)
    run = made["step"]._replace(hyper=hyper)
    group = data.group or responses(config, notes)
    batch = rows(config, mesh, data._replace(group=group), loss.needs, notes)
    programs: dict[str, Callable[[], Any]] = {}
    if unfilled(batch, loss.needs):
        programs["reference"] = lambda: run.fill.lower(state.average, lms, batch)

    programs["update"] = lambda: run.lower(state, lms, batch)
    return Plan(mesh, policy, state, lms, batch, made["moving"], programs, tuple(notes))


def rows(
    config, mesh: Mesh, data: Shape, needs: Sequence[str], notes: list[str]
) -> Batch:
    """The shapes of the longest batch that the source of a config would make."""
    b, t = (
        (config.batch_size, data.group),
        (config.batch_size, data.group, config.length),
    )

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = Batch(
        array(t, jnp.int32), array(t, bool), array(b, jnp.int32), array(b),
        array(b, bool),
    )  # fmt: skip
    if has_rollouts(config):
        fresh = on_policy.fresh(config, needs)
        named = {*needs, "sampler_logps"} if fresh else {*needs}
        of_extra = ("sampler_logps", "old_values", "returns")
        brought: Any = {k: array(t) for k in of_extra if k in named}
        batch = batch._replace(extra=brought or None)
        for name in ("ref_logps", *["old_logps"] * (not fresh), "advantages"):
            if name in needs:
                batch = batch._replace(**{name: array(t)})
    if config.reference_cache or config.reference_data:
        batch = batch._replace(ref_logps=array(t))
    if to := sharding.grid(config.layout, config.accumulate, mesh):
        blocks, tokens = math.prod(to), data.tokens or math.prod(t[1:])
        if not data.packed and not data.tokens:
            notes.append(
                f"every prompt is assumed to have {tokens} distinct tokens, the maximum "
                "(--tokens sets their mean)"
            )
        place = (blocks, *(data.packed or _packed(config, to, tokens, t)))
        ids, scored = array(place, jnp.int32), array(place, bool)
        laid = Layout(
            tokens=ids, positions=ids, group=ids, branch=ids, previous=ids,
            scored=scored, places=array(t, jnp.int32),
        )  # fmt: skip
        batch = batch._replace(layout=laid)
    return _spread(batch, mesh)


def _packed(config, to: tuple[int, int], tokens: int, t: tuple[int, ...]):
    """(R, L) of the rows that a source would choose if all prompts had equal length."""
    sizes = [tokens] * config.batch_size
    if config.layout == "packed" and not has_rollouts(config) and not config.mixture:
        order = batches.Order(
            sizes, config.batch_size, window=1, seed=0, shuffle=False, limit=None
        )
        chosen = batches.packing(order, *to)
        return chosen.rows, chosen.length
    each = config.batch_size // math.prod(to)
    return layout.choose([sizes[:each]] * math.prod(to), each, math.prod(t[1:]))


def responses(config, notes: list[str]) -> int:
    """G of the batches of a config; an assumption is added to `notes`."""
    if has_rollouts(config):
        kept = {"best": 1, "best_worst": 2}
        every = config.rollout.group + bool(config.rollout.anchor)
        return kept.get(config.rollout.keep, every)
    kind, most = ("sft", 1) if config.loss.name == "sft" else ("pairs", 2)
    found = []
    for spec in filter(None, (config.data, *config.mixture.values())):
        made = _made_up(plugin.plain_section(spec), kind, notes)
        try:
            data = plugin.load_examples(made, drop=("ratio",))
            found += [len(data[i].responses) for i in range(min(len(data), 64))]
        except (ValueError, OSError) as error:
            found.append(most)
            notes.append(f"{most} responses are assumed (--group): {error}")
    return max(found, default=most)


def _made_up(spec: dict[str, Any], kind: str, notes: list[str]) -> dict[str, Any]:
    """The section of a data set in which synthetic rows replace every file."""
    if "path" not in spec:
        return {
            k: _made_up(v, kind, notes) if isinstance(v, dict) else v
            for k, v in spec.items()
        }
    kind = spec.get("kind") or kind
    if kind == "groups":
        notes.append("groups of 4 responses are assumed (--group sets another)")
    return {"name": "synthetic", "split": "train", "kind": kind, "size": 64}


def without_weights(config, notes: list[str]) -> tuple[Any, tokenizer.Tokenizer]:
    """A copy of a config with sizes in place of a path, and a tokenizer for it.

    Raises:
      ValueError: neither sizes nor a path.
      FileNotFoundError: there is no model at the path.
    """
    config = config.copy_and_resolve_references()
    m = config.model
    with config.unlocked():
        if not m.sizes and m.path:
            m.sizes = dataclasses.asdict(architecture(m.path))
        elif m.path:
            notes.append(f"the sizes are those of the config, not read from {m.path}")
        m.path = ""
    if "vocab_size" in m.sizes or not config.tokenizer:
        return config, tokenizer.load("bytes")  # only the number of its ids is used
    return config, tokenizer.load(config.tokenizer)


def architecture(path: str) -> ModelConfig:
    """The config of a model from the header of its checkpoint; no weights are read.

    Raises:
      FileNotFoundError: no config.json or .gguf file at the path (adapters have neither).
      ValueError: the folder of a run, whose config.json does not describe a model.
    """
    place = epath.Path(path)
    if place.suffix == ".gguf" and place.exists():
        return families.from_hf(gguf.read(pathlib.Path(path))[0])
    if not (place / "config.json").exists():
        raise FileNotFoundError(
            f"no model at {path}: put its sizes into config.model.sizes"
        )
    header = json.loads((place / "config.json").read_text())
    if "model_type" not in header:
        raise ValueError(
            f"{path} is a run's folder: put its sizes into config.model.sizes"
        )
    return families.from_hf(header)


def held(tree: Any) -> int:
    """Bytes of a tree on one device, without padding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def gradient(config, plan: Plan) -> int:
    """Bytes of the gradient on one device; micro-batches are added up in float32."""
    tree = plan.state.params
    if config.accumulate > 1:
        tree = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
            tree,
        )
    return held(tree)


class OfHost(NamedTuple):
    """Bytes in the memory of a host, besides what the program itself takes."""

    chips: int  # of the host
    reading: int  # while weights are read: the share of a parameter in its chips
    saving: int  # while a checkpoint is written: a copy of what it writes


def first_host(mesh: Mesh) -> list[Any]:
    """The devices of the first host of a mesh."""
    first = min(d.process_index for d in mesh.devices.flat)
    return [d for d in mesh.devices.flat if d.process_index == first]


def of_host(plan: Plan, own: Sequence[Any]) -> OfHost:
    """The most that a host holds of a plan, with a copy of each shard.

    Args:
      plan: what runs.
      own: the devices of the host, such as `first_host`.
    """

    def share(x) -> int:
        places = x.sharding.devices_indices_map(x.shape)
        parts = len({str(places[d]) for d in own})
        # what is quantised is read in float32 at most
        width = 4 if x.dtype == jnp.int8 else x.dtype.itemsize
        return parts * math.prod(x.sharding.shard_shape(x.shape)) * width

    weights = jax.tree.leaves(
        (plan.policy.params, [lm.params for lm in plan.lms.values()])
    )
    state = sum(map(share, jax.tree.leaves(plan.state)))
    return OfHost(len(own), max(map(share, weights)), state)


def _frozen(policy: ModelConfig, notes: list[str], path: str, **_) -> LM:
    """A frozen LM with the sizes of the model at a path; without one, the policy's sizes."""
    try:
        config = architecture(path)
    except FileNotFoundError:
        config = dataclasses.replace(policy, value_head=False)
        notes.append(f"there is no model at {path}: the policy's sizes are assumed")
    return LM(config, transformer.init(config, jax.random.key(0)))


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of the rule table, as `put_params` would place them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree, sharding.shardings(tree, mesh),
    )  # fmt: skip


def _spread(batch: Batch, mesh: Mesh) -> Batch:
    """Shapes with the sharding of a batch."""
    place = NamedSharding(mesh, sharding.BATCH)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch
    )

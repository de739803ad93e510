"""The programs of a config, lowered for devices that need not be there.

The very functions that a run starts with are traced instead of called: nothing is drawn,
read or placed, so an 8B model takes no memory. A config says what model it is of: by its
sizes, or by a path whose header alone is read.
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
from alignax.inputs import layout, tokenizer
from alignax.inputs import plan as batches
from alignax.inputs.annotate import unfilled
from alignax.models import families, gguf, sharding, transformer
from alignax.models.transformer import ModelConfig
from alignax.training import build, checks, loading, step


class Shape(NamedTuple):
    """What data decide of a batch; 0 and None ask the config, and assume the worst."""

    group: int = 0  # G, responses a prompt
    tokens: int = 0  # distinct tokens of a prompt and its responses, on average
    packed: tuple[int, int] | None = None  # (R, L) of packed rows, if a run told them


UNKNOWN = Shape()


class Plan(NamedTuple):
    """What a training run holds on its devices, and the programs of one step."""

    mesh: Mesh
    policy: LM  # whole: with its frozen base, where adapters are trained
    state: Any  # every tree is one of shapes with their shardings
    lms: dict[str, LM]
    batch: Batch
    moving: int  # names beside `lms` that mean the policy's average
    programs: dict[str, Callable[[], Any]]  # each lowers one, in the order they run
    notes: tuple[str, ...]  # what had to be assumed


def plan(config, mesh: Mesh, data: Shape = UNKNOWN) -> Plan:
    """One optimiser step of a config, of which nothing exists.

    Args:
      config: a ConfigDict; it must say of which sizes its models are.
      mesh: real, fake or described devices.
      data: what is known of the data.

    Raises:
      ValueError, OSError: a config that cannot run on that mesh, as training says it.
    """
    checks.check(config)
    sharding.check_batch_size(config.batch_size, config.accumulate, mesh)
    notes: list[str] = []
    config, ids = without_weights(config, notes)
    loss = plugin.load_loss(config)
    made: dict[str, Any] = {}

    def start():
        """As `build.build` and `train.train` begin, but for the data."""
        policy = loading.make_policy(config, ids)
        load = functools.partial(_frozen, policy.config, notes)
        pieces = build.pieces(config, policy, mesh, ids=ids.vocab_size, load=load)
        state = step.init_state(
            pieces.policy.params, pieces.tx, mesh, ema=loss.ema,
            average=config.average > 0,
        )  # fmt: skip
        made["step"] = step.make_train_step(
            policy.config, pieces.tx, loss, mesh, **build.settings(config, pieces)
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
    """The shapes of the longest batch of a config, as its source would bring it."""
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
    if config.rollout.reward:
        brought: Any = {k: array(t) for k in ("old_values", "returns") if k in needs}
        batch = batch._replace(extra=brought or None)
        for name in ("ref_logps", "old_logps", "advantages"):
            if name in needs:
                batch = batch._replace(**{name: array(t)})
    if config.reference_cache or config.reference_data:
        batch = batch._replace(ref_logps=array(t))
    if to := sharding.grid(config.layout, config.accumulate, mesh):
        blocks, tokens = math.prod(to), data.tokens or math.prod(t[1:])
        if not data.packed and not data.tokens:
            notes.append(
                f"every prompt has {tokens} distinct tokens, which is the most (--tokens "
                "sets their mean)"
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
    """(R, L) of the rows that a source would choose, were all prompts alike."""
    sizes = [tokens] * config.batch_size
    if config.layout == "packed" and not config.rollout.reward and not config.mixture:
        filled = batches.Filled(
            sizes, config.batch_size, window=1, seed=0, shuffle=False
        )
        chosen = filled.packing(*to)
        return chosen.rows, chosen.length
    each = config.batch_size // math.prod(to)
    return layout.choose([sizes[:each]] * math.prod(to), each, math.prod(t[1:]))


def responses(config, notes: list[str]) -> int:
    """G of the batches of a config; what it does not say is assumed, and noted."""
    if config.rollout.reward:
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
    """The section of a data set with made-up rows in the place of every file."""
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
    """A copy of a config that starts from sizes, and a tokenizer it could have.

    Raises:
      ValueError: neither sizes nor a path.
      FileNotFoundError: a path at which there is no model.
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
        return config, tokenizer.load("bytes")  # only how many ids it has is asked
    return config, tokenizer.load(config.tokenizer)


def architecture(path: str) -> ModelConfig:
    """What the header of a checkpoint says; its weights are not read.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a run's folder or adapters, which name no sizes of their own.
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


def _frozen(policy: ModelConfig, notes: list[str], path: str) -> LM:
    """A frozen LM of a path; of the policy's sizes where nothing is at the path."""
    try:
        config = architecture(path)
    except FileNotFoundError:
        config = dataclasses.replace(policy, value_head=False)
        notes.append(f"nothing is at {path}: assumed of the policy's sizes")
    return LM(config, transformer.init(config, jax.random.key(0)))


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of the rule table, as `put_params` places arrays."""
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

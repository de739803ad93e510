"""What preflight reads, counts and refuses; the module it compiles is the one that trains."""

import dataclasses
import importlib.util
import json
import math
import types

import absl.flags
import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import logprob
from alignax.batch import LM
from alignax.inputs.annotate import unfilled
from alignax.models import families, sharding, transformer
from alignax.preflight import __main__, chips, compiled, footprint, lowering, preflight
from alignax.training import build, checks, step

pytestmark = pytest.mark.slow

MADE = {"name": "synthetic", "split": "train"}


def trained(config, workdir):
    """The programs that training runs, lowered from its own arrays."""
    run = build.build(config, str(workdir))
    state = step.init_state(
        run.policy.params,
        run.tx,
        run.mesh,
        ema=run.loss.ema,
        average=checks.keeps_average(config),
    )
    one = step.make_train_step(
        run.policy.config,
        run.tx,
        run.loss,
        run.mesh,
        **build.settings(config, run, run.loss),
    )
    rows = run.source.next(state.params, 0, state.average)
    batch = sharding.put_batch(rows, run.mesh)
    programs = {}
    if unfilled(batch, one.needs):
        programs["reference"] = one.fill.lower(state.average, run.lms, batch)
        batch = one.fill(state.average, run.lms, batch)
    program = one.program(state)
    programs["update"] = program.lower(state, run.lms, batch, one.hyper)
    return programs, rows


def planned(**changes):
    config = tiny.config("pairs", layout="rows", **changes)
    return lowering.plan(config, sharding.make_mesh(config.mesh))


def test_the_module_of_packed_adapters_is_the_one_that_trains(tmp_path):
    config = tiny.config("pairs", **{
        "mesh": (2, 1, 2), "accumulate": 2, "average": 0.9, "lora.rank": 2,
        "model.remat": "block",
    })  # fmt: skip
    want, rows = trained(config, tmp_path / "run")
    data = lowering.Shape(packed=rows.layout.tokens.shape[1:])
    got = lowering.plan(config, sharding.make_mesh(config.mesh), data).programs
    assert list(got) == list(want)
    for key in want:
        assert compiled.fingerprint(got[key]()) == compiled.fingerprint(want[key]), key


def test_another_program_has_another_fingerprint():
    one, other = (jax.jit(lambda x, n=n: x + n).lower(1.0) for n in (1, 2))
    assert compiled.fingerprint(one) != compiled.fingerprint(other)


def test_a_loss_that_reads_no_frozen_lm_runs_one_program():
    config = tiny.config("sft")
    plan = lowering.plan(config, sharding.make_mesh((1, 1, 1)))
    assert list(plan.programs) == ["update"]
    assert plan.lms == {}


def test_what_is_held_is_counted_by_hand():
    """Of adamw: the parameters three times; the reference once; halves over fsdp=2."""
    plan = planned(mesh=(1, 2, 1))
    # norms are replicated; everything else of this model divides by two
    total = transformer.num_params(plan.policy.params)
    norms = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(plan.policy.params)
        if "scale" in jax.tree_util.keystr(path)
    )
    share = 4 * (norms + (total - norms) // 2)
    assert lowering.held(plan.lms) == share
    numbers = 3 * 4  # the step, and what adam and the schedule count
    assert lowering.held(plan.state) == 3 * share + numbers
    b, g, t = 4, 2, 72
    assert lowering.held(plan.batch) == b // 2 * g * (t * (4 + 1) + 4 + 4 + 1)
    assert plan.batch.tokens.shape == (b, g, t)


@pytest.mark.parametrize("accumulate, size", [(1, 2), (2, 4)])
def test_micro_batches_are_added_up_in_float32(accumulate, size):
    config = tiny.config("pairs", layout="rows", accumulate=accumulate, mesh=(1, 1, 1))
    config.model.param_dtype = "bfloat16"
    plan = lowering.plan(config, sharding.make_mesh(config.mesh))
    number = transformer.num_params(plan.policy.params)
    assert lowering.gradient(config, plan) == size * number


def test_what_a_host_holds_is_counted_by_hand():
    """Of a replicated parameter one copy; of parts on its chips the parts."""
    plan = planned(mesh=(2, 2, 1))
    every = lowering.first_host(plan.mesh)
    largest = max(x.size for x in jax.tree.leaves(plan.policy.params))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.state))
    assert lowering.of_host(plan, every) == (4, 4 * largest, state)
    # devices 0 and 2 hold the same half of what fsdp=2 splits
    norms = sum(
        x.size * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(plan.state)
        if not x.ndim or "scale" in jax.tree_util.keystr(path)
    )
    half = norms + (state - norms) // 2
    assert lowering.of_host(plan, every[::2]) == (2, 2 * largest, half)
    assert lowering.of_host(plan, every[:2]) == (2, 4 * largest, state)


def test_packed_rows_hold_what_the_data_have():
    config = tiny.config("pairs", mesh=(1, 2, 1))
    mesh = sharding.make_mesh(config.mesh)
    most = lowering.plan(config, mesh).batch.layout.tokens.shape
    assert math.prod(most) >= 4 * 2 * 72, "four prompts, nothing shared"
    few = lowering.plan(config, mesh, lowering.Shape(tokens=40)).batch.layout.tokens
    assert few.shape[0] == 2, "a block a shard"
    assert 4 * 40 <= few.size < 4 * 50
    known = lowering.Shape(packed=(3, 80))
    assert lowering.plan(config, mesh, known).batch.layout.tokens.shape == (2, 3, 80)
    assert footprint.computed(lowering.plan(config, mesh, known)).size == 2 * 3 * 80


def test_sizes_come_from_the_header_and_weights_are_not_read(tmp_path, tiny_config):

    header = families.to_hf(tiny_config)

    (tmp_path / "config.json").write_text(json.dumps(header))
    found = lowering.architecture(str(tmp_path))
    assert (found.width, found.num_layers) == (
        tiny_config.width,
        tiny_config.num_layers,
    )
    with pytest.raises(FileNotFoundError, match=r"no model at nowhere.*model\.sizes"):
        lowering.architecture("nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run's folder"):
        lowering.architecture(str(tmp_path))


def test_what_the_config_does_not_say_is_noted():
    config = tiny.config("pairs", layout="rows", lms={"ref": "weights/not/here"})
    plan = lowering.plan(config, sharding.make_mesh((1, 1, 1)))
    assert plan.notes == (
        "there is no model at weights/not/here: the policy's sizes are assumed",
    )


@pytest.mark.parametrize(
    "changes, group",
    [
        ({"loss": {"name": "sft"}}, 1),
        ({"data": {**MADE, "kind": "groups", "group": 3}}, 3),
        ({"rollout.reward": {"name": "length"}, "rollout.group": 5}, 5),
        ({"rollout.reward": {"name": "length"}, "rollout.keep": "best_worst"}, 2),
    ],
)
def test_responses_a_prompt_are_what_the_config_says(changes, group):
    config = tiny.config("pairs", **changes)
    if "loss" in changes:
        config.data.kind = "sft"
    notes = []
    assert lowering.responses(config, notes) == group
    assert not notes


@pytest.mark.parametrize(
    "name, group",
    [
        ("bco", 1),
        ("bco_matched", 1),
        ("kto", 2),
        ("npo", 1),
        ("dpo", 2),
        ("ranking", 4),
    ],
)
def test_data_that_are_not_there_are_made_up(name, group):
    """Their files are missing; what is made of the rows in them is not."""
    config = importlib.import_module(f"configs.{name}").get_config()
    notes = []
    assert lowering.responses(config, notes) == group
    assert len(notes) == (name == "ranking")  # of how many a file's groups are


def test_data_that_cannot_be_made_up_are_noted():
    config = tiny.config("pairs")
    config.data = {"name": "jsonl", "split": "train"}
    notes = []
    assert lowering.responses(config, notes) == 2
    assert "2 responses are assumed (--group)" in notes[0]


# -- what a compiled program says of itself

GOLDEN = """\
HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/lib/jax/lax.py"
2 "/somewhere/alignax/models/transformer.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%inner_piece (p.0: bf16[8,16]) -> bf16[64,16] {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%outer_piece (p.1: bf16[8,16]) -> bf16[64,16] {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.4 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%tile (c.0: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %c.0 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x.0 = bf16[8,16]{1,0} get-tuple-element(%c.0), index=1
  %piece.1 = bf16[64,16]{1,0} fusion(%x.0), kind=kOutput, calls=%inner_piece
  ROOT %t.0 = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%x.0, %x.0)
}

%more (c.1: (s32[], bf16[8,16])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %k.0 = s32[]{:T(128)} constant(4)
  %i.0 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%i.0, %k.0), direction=LT
}

%layer (c.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %c.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %x.2 = bf16[8,16]{1,0} get-tuple-element(%c.2), index=1
  %piece.2 = bf16[64,16]{1,0} fusion(%x.2), kind=kOutput, calls=%outer_piece
  %big.0 = f32[512,1024]{1,0:T(8,128)} dot(%piece.2, %piece.2), lhs_contracting_dims={0}, metadata={op_name="jit(f)/dot" stack_frame_id=2}
  %near.0 = f32[512,1024]{1,0:T(8,128)S(1)} copy(%big.0)
  %w.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%c.2), condition=%more, body=%tile
  %grad.0 = f32[512,1024]{1,0} all-reduce(%big.0), channel_id=6, replica_groups=[2,4]<=[8], to_apply=%sum, metadata={op_name="jit(f)/grad" stack_frame_id=1}
  ROOT %t.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%x.2, %x.2)
}

%unknown (c.3: (s32[], bf16[8,16])) -> pred[] {
  %c.3 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%c.3), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%i.3, %i.3), direction=LT
}

%walk (c.4: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %c.4 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %r.0 = (f32[256]{0}, /*index=1*/f32[2]{0}) all-reduce(%i.4, %i.5), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %t.4 = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%c.4, %c.4)
}

ENTRY %main (arg.0: bf16[8,16]) -> bf16[8,16] {
  %arg.0 = bf16[8,16]{1,0} parameter(0)
  %scatter.0 = f32[64]{0} iota(), iota_dimension=0
  %rs.0 = f32[8]{0} reduce-scatter(%scatter.0), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
  %w.0 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%arg.0), condition=%any, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %w.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%w.0), condition=%unknown, body=%walk
  ROOT %out.0 = bf16[8,16]{1,0} get-tuple-element(%w.2), index=1
}
"""


def test_loops_multiply_and_one_that_the_data_decide_counts_once():
    runs = compiled.Module(GOLDEN).runs
    assert runs["layer"] == (3, True)
    assert runs["tile"] == (3 * 4, True)
    assert runs["walk"] == (1, False)


def test_collectives_of_a_program_by_hand():
    found = compiled.collectives(compiled.Module(GOLDEN))
    rows = {(c.kind, c.group, c.size, c.times, c.bounded) for c in found}
    assert rows == {
        # two pieces of one channel, of which the inner loop runs one four times as often
        ("all-gather", 8, 64 * 16 * 2, 3, True),
        ("all-reduce", 4, 512 * 1024 * 4, 3, True),
        ("all-reduce", 2, 258 * 4, 1, False),
        ("reduce-scatter", 8, 64 * 4, 1, True),
    }
    assert found[0].source == "alignax/models/transformer.py:7"
    assert compiled.by_kind(found)["all-reduce"] == (4, 3 * 512 * 1024 * 4 + 258 * 4)
    # a ring of 4 passes 3/4 of the tensor on, twice; a reduce-scatter of 8 7/8, once
    assert compiled.wire(found[0]) == 3 * 512 * 1024 * 4 * 0.75 * 2
    last = next(c for c in found if c.kind == "reduce-scatter")
    assert compiled.wire(last) == 64 * 4 * 7 / 8


def test_buffers_are_of_main_memory_and_no_views():
    """Not the copy that a TPU keeps on the chip, nor what a fusion holds inside."""
    found = compiled.buffers(compiled.Module(GOLDEN), least=2**11)
    sizes = {b.shape: (b.size, b.makers) for b in found}
    assert sizes == {
        "f32[512,1024]": (2**21, 2),  # %big and %grad
        "bf16[64,16]": (2048, 2),
    }
    # the frame is jax's own, its caller is ours
    assert found[0].sources == ("alignax/models/transformer.py:7",)


def test_loops_and_collectives_of_a_real_program():
    mesh = sharding.make_mesh((1, 4, 2))
    place = NamedSharding(mesh, P("fsdp", "model"))

    def f(x, n):
        def body(y, _):
            y = jax.lax.with_sharding_constraint(y @ y.T, place)
            return y, None

        y, _ = jax.lax.scan(body, x, length=5)
        return jax.lax.fori_loop(0, n, lambda i, y: y + y.sum(), y)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place)
    n = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    program = jax.jit(f).lower(x, n).compile()
    found = compiled.collectives(compiled.Module(program.as_text()))
    assert found
    assert {c.times for c in found if c.bounded} == {5}
    assert {c.times for c in found if not c.bounded} == {1}
    assert {c.group for c in found} <= {2, 4, 8}
    memory = compiled.memory(program)
    assert memory.arguments == 64 * 64 * 4 // 8 + 4
    assert memory.peak >= memory.arguments + memory.outputs


# -- the kernel


def test_a_vocabulary_over_model_is_never_gathered(tiny_config):
    """Read off the compiled module: nothing of V columns but the head's own shard."""

    v = 2048
    config = dataclasses.replace(tiny_config, vocab_size=v, tied=False)
    mesh = sharding.make_mesh((1, 2, 4))
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    params = lowering._placed(shapes, mesh)
    row = NamedSharding(mesh, sharding.BATCH)
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=row)

    def total(params, tokens):
        lm = LM(config, params)
        return logprob.sequence_logps(lm, tokens, mesh=mesh, tiles=(16, 128)).sum()

    program = jax.jit(jax.grad(total)).lower(params, tokens).compile()
    found = compiled.collectives(compiled.Module(program.as_text()))
    gathers = [c for c in found if c.kind == "all-gather"]
    # gathered over fsdp, a shard of the head is D V / 4; logits would be 16 V or more
    assert max(c.size for c in gathers) == config.width * v // 4 * 4
    whole = 2 * 16 * v * 4  # of logits of one shard's tokens
    assert not [c for c in gathers if c.size >= whole]
    text = program.as_text()
    assert f",{v}]" not in text, "an array with all columns of the vocabulary"
    assert f",{v // 4}]" in text


# -- the report


ROWS = {"mesh": (1, 4, 1), "layout": "rows"}


@pytest.fixture(scope="module")
def report():
    topology = chips.parse("h100:4")
    config = tiny.config("pairs", **ROWS)
    return footprint.inspect(config, topology, chips.devices(topology))


def test_the_module_it_compiles_is_the_one_that_trains(report, tmp_path):
    want, _ = trained(tiny.config("pairs", **ROWS), tmp_path / "run")
    assert {p.name: p.fingerprint for p in report.programs} == {
        name: compiled.fingerprint(lowered) for name, lowered in want.items()
    }


def test_a_report_says_what_it_must(report):
    assert report.fits
    assert [p.name for p in report.programs] == ["reference", "update"]
    text = preflight.describe(report)
    assert "ESTIMATE" in text
    assert "verdict: fits" in text
    assert report.programs[1].fingerprint in text
    for word in (
        "arguments",
        "temporaries",
        "all-gather",
        "FLOPs per token",
        "bound by",
        "held by a host (of 4 chips) besides",
    ):
        assert word in text


def test_the_peak_holds_what_a_program_does_not_read(report):
    reference, update = report.programs
    # the reference's program does not read the optimiser's state
    assert reference.elsewhere >= report.held["state"]
    assert reference.peak == reference.memory.peak + reference.elsewhere
    # the update does not read the frozen LM, but its column [B / 4, G, T]
    assert update.elsewhere >= report.held["frozen LMs"] - 2 * 72 * 4


def test_flops_a_token_by_hand():
    """Of a Llama-3-8B-like shape: 6N and 2N, a head as wide as the vocabulary."""
    sizes = dict(width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
                 mlp_width=128, vocab_size=512, tied=False)  # fmt: skip
    low = planned(**{"model.sizes": sizes, "model.remat": "block"})
    n = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 512
    n += 3 * 2 * 64  # norms, which cost next to nothing
    attention = 4 * 3 * 4 * 16 * (1 + 72) / 2  # a token sees itself and those before
    assert footprint.costs(low).model == 8 * n + 4 * attention
    again = 2 * n + attention
    assert footprint.costs(low).computed == 8 * n + 4 * attention + again


def test_flops_of_packed_rows_by_hand():
    """Four prompts in a row of 400: each has 100 tokens, which see none of another's."""
    changes = {"layout": "packed", "lms": {"ref": "average"}, "average": 0.9}
    config = tiny.config("pairs", **changes)
    data = lowering.Shape(packed=(1, 400))
    low = lowering.plan(config, sharding.make_mesh((1, 1, 1)), data)
    c = low.policy.config
    n = transformer.num_params(low.policy.params["blocks"]) + c.vocab_size * c.width
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * (1 + 100) / 2
    assert "reference" in low.programs
    assert low.lms == {}, "the average is no frozen LM, but it is read"
    assert footprint.costs(low).model == 6 * n + 2 * n + 4 * attention


def test_a_step_that_does_not_fit_is_told_what_would(report, monkeypatch, capsys):
    small = chips.CHIPS["h100"]._replace(memory=20 * 2**10)
    monkeypatch.setitem(chips.CHIPS, "h100", small)
    seen = []

    def inspect(config, *_, **__):
        seen.append(config)
        return report._replace(mesh={"data": 2, "fsdp": 2, "model": 1})

    monkeypatch.setattr(footprint, "inspect", inspect)
    config = tiny.config("pairs", mesh=(-1, 2, 1), batch_size=8)
    assert preflight.preflight(config, "h100:4", tries=1) == 1
    assert [c.model.remat for c in seen] == ["elementwise", "block"]
    text = capsys.readouterr().out
    assert "verdict: does NOT fit" in text
    assert "remat: --config.model.remat=block -> tried: does not fit" in text
    assert "mesh: '--config.mesh=(1,4,1)' -> estimated" in text
    assert "micro-batch: --config.accumulate=2 -> estimated" in text
    for name in ("cached reference", "LoRA"):
        assert f"{name}: --config." in text


def test_an_estimate_counts_what_is_held(report):
    """Adapters need no optimiser's state and no gradient of the base."""
    config = tiny.config("pairs", **ROWS)
    devices = chips.devices(report.topology)
    adapters = preflight.changed(config, {"lora.rank": 1})

    def estimate(changed):
        return footprint.estimate(config, changed, report, devices)

    assert estimate(config) == pytest.approx(report.peak, abs=1)
    saved = estimate(config) - estimate(adapters)
    share = report.held["frozen LMs"]  # a copy of all weights
    assert 0.8 * 3 * share < saved < 3 * share  # two moments and a gradient


def test_a_sweep_tries_every_mesh_that_divides_the_batch(report, monkeypatch, capsys):
    def inspect(config, *_, **__):
        refused = report.programs[1]._replace(memory=None)
        bad = report._replace(programs=(report.programs[0], refused))
        return bad if tuple(config.mesh) == (2, 1, 1) else report

    monkeypatch.setattr(footprint, "inspect", inspect)
    config = tiny.config("pairs", batch_size=2)
    assert preflight.preflight(config, "h100:2", sweep=True) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    # one key-value head: 'model' stays 1
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 1, 2, 1", "yes"], ["| 2, 1, 1", "no"],
    ]  # fmt: skip


def test_meshes_divide_devices_heads_and_batch():
    config = tiny.config("pairs", batch_size=4)
    config.model.sizes.num_kv_heads = 2
    found = preflight.meshes(config, 8)
    assert all(math.prod(m) == 8 for m in found)
    assert found == [(1, 4, 2), (2, 2, 2), (4, 1, 2)]


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5e", "expected CHIP:SHAPE"),
        ("v9:2x2", "the chips are v4, v5e"),
        ("v5e:2x2x2", "has 3 dimensions, v5e has 2: v5e:4x4"),
        ("h100:2x2", "has 2 dimensions, h100 has 1: h100:4"),
        ("h100:0", "expected CHIP:SHAPE"),
    ],
)
def test_an_unknown_topology_is_an_error_that_says_what_to_type(name, words):
    with pytest.raises(ValueError, match=words):
        chips.parse(name)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"topology": "h100:0"}, "unknown topology 'h100:0'"),
        ({"packed": ["a", "b"]}, "--packed=a,b: expected rows,tokens"),
        ({"packed": ["3"]}, "--packed=3: expected rows,tokens"),
    ],
)
def test_an_error_is_one_line_and_no_verdict(changes, words, monkeypatch, capsys):
    given = {"topology": "v5e:2x2", "packed": [], **changes}
    monkeypatch.setattr(absl.flags, "FLAGS", types.SimpleNamespace(**given))
    with pytest.raises(SystemExit) as end:
        __main__.main(["preflight"])
    assert end.value.code == 2  # 1 is: it does not fit
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'alignax\[preflight\]'"):
        chips.devices(chips.parse("v5e:2x2"))


def test_a_mesh_that_leaves_chips_idle_is_an_error():
    config = tiny.config("pairs", mesh=(1, 2, 1))
    topology = chips.parse("h100:4")
    with pytest.raises(ValueError, match=r"uses 2 of 4.*--config\.mesh=\(1,4,1\)"):
        footprint.inspect(config, topology, chips.devices(topology))


def test_a_refusal_tells_what_it_asked_for_and_never_fits(report):
    words = "total memory required for HLO temporaries (30.50G) exceeds available HBM (15.75G)."
    program = footprint.Program("update", "", 0.0, None, 0, (), (), words)
    assert program.peak == 30.5 * 2**30
    assert program._replace(refused="RESOURCE_EXHAUSTED").peak == math.inf
    little = program._replace(refused="Used 1.00G of 15.75G hbm")
    assert not report._replace(programs=(little,)).fits


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler installed"
)


@needs_libtpu
def test_slices_are_described_without_a_tpu():
    for name, kind in (
        ("v5e:2x2", "v5 lite"), ("v5p:2x2x1", "v5"), ("v5e:1x1", "v5 lite"),
        ("v4:2x2x1", "v4"), ("v6e:2x2", "v6 lite"),
    ):  # fmt: skip
        topology = chips.parse(name)
        found = chips.devices(topology)
        assert len(found) == math.prod(topology.shape)
        assert kind in found[0].device_kind
        assert topology.chip.kind in found[0].device_kind
    hosts = lowering.first_host(sharding.make_mesh((1, 16, 1), chips.devices(chips.parse("v5e:4x4"))))  # fmt: skip
    assert len(hosts) < 16
    with pytest.raises(ValueError, match="no slice 'v5e:3x5'"):
        chips.devices(chips.parse("v5e:3x5"))


@needs_libtpu
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_the_tpu_compiler_takes_the_step():
    config = tiny.config("pairs", mesh=(1, 4, 1))
    topology = chips.parse("v5e:2x2")
    found = footprint.inspect(config, topology, chips.devices(topology))
    assert found.fits
    assert all(p.memory.arguments > 0 for p in found.programs)
    on_cpu = lowering.plan(config, sharding.make_mesh((1, 4, 1)))
    marks = [compiled.fingerprint(p()) for p in on_cpu.programs.values()]
    assert [p.fingerprint for p in found.programs] == marks

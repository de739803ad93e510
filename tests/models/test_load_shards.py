"""Weights that are read by shards are those that are read whole, and little else is held."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax.batch import LM
from alignax.models import load as load_module
from alignax.models import save, sharding, stored
from alignax.models.load import load
from alignax.models.sharding import make_mesh
from alignax.models.transformer import ModelConfig
from alignax.runs import checkpoint
from alignax.training import loading, loop

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
MODELS = ("llama_tied", "llama_untied", "llama_reward", "qwen2", "qwen3", "gemma3")
WIDE = ModelConfig(
    vocab_size=48, width=16, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=6,
    mlp_width=32, max_length=64, qkv_bias=True, tied=False, value_head=True,
    family="qwen2",
)  # fmt: skip


def equal(got, want, mesh=None):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype
        if mesh is not None:
            name = sharding.path_string(path)
            assert x.sharding.spec == sharding.spec(name, x.shape, mesh), name


@pytest.fixture(params=[2**23, 64], ids=["long-chunks", "short-chunks"])
def chunks(request, monkeypatch):
    """How much is read at once; 64 bytes are less than a row."""
    monkeypatch.setattr(stored, "CHUNK", request.param)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4), (2, 4, 1), (1, 1, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_of_every_kind_of_axis(tmp_path, make_lm, chunks, shape, dtype):
    lm = make_lm(WIDE)
    lm = LM(WIDE, jax.tree.map(lambda x: x.astype(dtype), lm.params))
    save.save(lm, tmp_path / "m", max_shard_bytes=5000)
    assert len([*(tmp_path / "m").glob("*.safetensors")]) > 3
    mesh = make_mesh(shape)
    got = load(tmp_path / "m", dtype=dtype, mesh=mesh)
    equal(got.params, lm.params, mesh)
    if shape == (1, 2, 4):
        held = got.params["blocks"]["attn"]["o"]["kernel"]
        assert len({str(s.index) for s in held.addressable_shards}) == 8


@pytest.mark.parametrize("name", MODELS)
def test_the_families(name, chunks):
    mesh = make_mesh((1, 2, 2))
    equal(load(GOLDEN / name, mesh=mesh).params, load(GOLDEN / name).params, mesh)


def test_a_gguf_file(chunks):
    """Rows of q and k are interleaved there, head by head."""
    pytest.importorskip("gguf")
    path, mesh = GOLDEN / "llama_gguf" / "model.gguf", make_mesh((1, 2, 2))
    equal(load(path, mesh=mesh).params, load(path).params, mesh)


def test_a_part_that_cuts_every_axis(make_lm, tmp_path, chunks):
    """Whatever the rule table says: also head axes that are merged in the file."""
    save.save(make_lm(WIDE), tmp_path / "m")
    lm, (_, tensors) = load(tmp_path / "m"), load_module._read_directory(tmp_path / "m")
    for p, name in (("o", "o_proj"), ("q", "q_proj")):
        whole = np.asarray(lm.params["blocks"]["attn"][p]["kernel"])
        kept = [tensors[f"model.layers.{i}.self_attn.{name}.weight"] for i in range(3)]
        bounds = tuple((n // 3, n - n // 4) for n in whole.shape)
        part = load_module._parts(
            f"blocks/attn/{p}/kernel", whole.shape, kept, np.dtype("float32"), [bounds]
        )[bounds]
        np.testing.assert_array_equal(part, whole[tuple(slice(*b) for b in bounds)])


def test_every_byte_is_read_once(tmp_path, make_lm, monkeypatch):
    """Also where eight devices of a host hold eight parts of a row."""
    save.save(make_lm(WIDE), tmp_path / "m")
    read, total = stored.read_at, []

    def counted(path, offset, many):
        total.append(many)
        return read(path, offset, many)

    load(tmp_path / "m")
    monkeypatch.setattr(stored, "read_at", counted)
    load(tmp_path / "m", mesh=make_mesh((1, 8, 1)))
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert sum(total) == size  # the header included


def test_a_host_reads_its_own_rows_alone(tmp_path, make_lm, monkeypatch):
    save.save(make_lm(dataclasses.replace(WIDE, qkv_bias=False, family="llama")), tmp_path / "m")  # fmt: skip
    mesh, seen = make_mesh((1, 1, 8)), []
    _, tensors = load_module._read_directory(tmp_path / "m")
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    own = up._replace(rows=lambda a, b: seen.append((a, b)) or up.rows(a, b))
    place = jax.sharding.NamedSharding(mesh, sharding.spec("blocks/mlp/up/kernel", (3, 16, 32), mesh))  # fmt: skip
    bounds = [load_module._bounds(i, (3, 16, 32)) for i in place.addressable_devices_indices_map((3, 16, 32)).values()]  # fmt: skip
    load_module._parts("blocks/mlp/up/kernel", (3, 16, 32), [own] * 3, np.dtype("float32"), bounds[2:4])  # fmt: skip
    assert seen == [(8, 16)] * 3


MEASURE = """
import resource, sys
import numpy as np
import jax
from alignax.models import sharding
from alignax.models.load import load
path, dtype, shape = sys.argv[1], sys.argv[2], eval(sys.argv[3])
mesh = sharding.make_mesh(shape) if shape else None
load(sys.argv[4], dtype=dtype, mesh=mesh)  # all that is imported or compiled once
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return {l.split(":")[0]: int(l.split()[1]) * 1024 for l in lines if l.startswith("Vm")}
try:
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak until now
except OSError:
    pass
before = peak()["VmRSS"]
params = load(path, dtype=dtype, mesh=mesh).params
size = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(peak()["VmHWM"] - before, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "files, dtype, mesh",
    [
        ("one", "float32", "None"),
        ("one", "bfloat16", "(1, 2, 2)"),
        ("several", "float32", "(1, 1, 1)"),
        ("several", "bfloat16", "None"),
        ("several", "float32", "(1, 2, 2)"),
    ],
)
def test_little_more_is_held_than_what_is_placed(tmp_path, make_lm, files, dtype, mesh):
    """At most 1.3 times the bytes on the devices of this host."""
    config = dataclasses.replace(
        WIDE, vocab_size=32_000, width=512, num_layers=12, num_heads=8, num_kv_heads=4,
        head_dim=64, mlp_width=1536, value_head=False, tied=True,
    )  # fmt: skip
    small = dataclasses.replace(config, width=64, mlp_width=128, vocab_size=512)
    for name, c in (("big", config), ("small", small)):
        save.save(
            make_lm(c), tmp_path / name,
            max_shard_bytes=4 * 10**9 if files == "one" else 40 * 10**6,
        )  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "big", dtype, mesh, tmp_path / "small"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    held, size = map(int, out.split())
    assert size > 90e6
    assert held < 1.3 * size, f"{held / size:.2f} times"


def test_a_run_trains_from_weights_that_were_read_by_shards(tmp_path, make_lm):
    """The same steps as on one device, from HF weights and from a run's folder."""
    config = tiny.config("pairs")
    lm_config = dataclasses.replace(
        loading.model_config(config, 260), family="llama", norm_eps=1e-5
    )
    save.save(make_lm(lm_config), tmp_path / "m")
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        changes = {"mesh": shape, "model.path": str(tmp_path / "m"), "num_steps": 2,
                   "tokenizer": "bytes", "model.sizes": {}, "lms": {"ref": "init"}}  # fmt: skip
        workdir = tmp_path / f"run{shape[1]}"
        state = loop.train(tiny.config("pairs", **changes), str(workdir))
        changes["model.path"] = str(workdir)
        again = loop.train(tiny.config("pairs", **changes), str(tmp_path / f"on{shape[1]}"))  # fmt: skip
        found.append(jax.device_get((state.params, again.params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *found)


def test_the_memory_of_the_first_parameters_is_the_states(tmp_path, make_lm, monkeypatch):  # fmt: skip
    """Unless a frozen LM is the same arrays: then they stay."""
    config = tiny.config("pairs")
    lm_config = dataclasses.replace(loading.model_config(config, 260), family="llama")
    save.save(make_lm(lm_config), tmp_path / "m")
    seen = {}
    init = loop.init_state

    def watched(params, *args, **kwargs):
        state = init(params, *args, **kwargs)
        seen["gone"] = [x.is_deleted() for x in jax.tree.leaves(params)]
        return state

    monkeypatch.setattr(loop, "init_state", watched)
    base = {"model.path": str(tmp_path / "m"), "tokenizer": "bytes", "num_steps": 1, "model.sizes": {}}  # fmt: skip
    loop.train(tiny.config("sft", **base), str(tmp_path / "a"))  # fmt: skip
    assert all(seen["gone"])
    loop.train(tiny.config("pairs", **base), str(tmp_path / "b"))
    assert not any(seen["gone"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_that_is_not_finite_is_found_in_any_shard(tiny_lm, value, dtype):
    mesh = make_mesh((1, 2, 2))
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_lm.params)
    loading.check_finite(sharding.placed(params, mesh), "x")
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    params["blocks"]["mlp"]["up"]["kernel"] = kernel.at[1, -1, -1].set(value)
    with pytest.raises(ValueError, match="x: blocks/mlp/up/kernel has weights"):
        loading.check_finite(sharding.placed(params, mesh), "x")


def test_what_is_placed_is_not_copied(tiny_lm):
    mesh = make_mesh((1, 2, 2))
    once = sharding.placed(tiny_lm.params, mesh)
    again = sharding.placed(once, mesh)
    jax.tree.map(lambda a, b: None if a is b else pytest.fail("a copy"), once, again)
    part = {**once, "norm": jax.tree.map(np.asarray, once["norm"])}
    assert not sharding.is_placed(part, mesh)
    mixed = sharding.placed(part, mesh)
    assert mixed["embed"] is once["embed"]
    equal(mixed, tiny_lm.params, mesh)


@pytest.mark.parametrize("name", ["peft_llama", "peft_dora", "peft_untied"])
def test_merged_adapters_are_the_same_bits_on_every_mesh(name):
    """A checksum of them stands in checkpoints, and a sum over shards rounds otherwise."""
    want = checkpoint.fingerprint(loading.load_lm(str(GOLDEN / name)).params)
    for shape in ((1, 2, 2), (1, 4, 1)):
        got = loading.load_lm(str(GOLDEN / name), mesh=make_mesh(shape))
        assert checkpoint.fingerprint(got.params) == want


def test_a_run_with_adapters_is_the_same_bits_on_every_mesh(tmp_path):
    config = tiny.config("pairs", num_steps=1, **{"lora.rank": 2, "lora.dora": True})
    loop.train(config, str(tmp_path / "run"))
    want = checkpoint.fingerprint(loading.load_lm(str(tmp_path / "run")).params)
    got = loading.load_lm(str(tmp_path / "run"), mesh=make_mesh((1, 2, 2)))
    assert checkpoint.fingerprint(got.params) == want


def test_the_check_on_a_device_agrees_with_that_on_the_host(tiny_lm, monkeypatch):
    """It leaves no copy on the host."""
    mesh = make_mesh((1, 2, 2))
    params = sharding.placed(tiny_lm.params, mesh)
    monkeypatch.setattr(loading, "_on_host", lambda x: False)
    monkeypatch.setattr(
        loading, "_is_finite", lambda x: pytest.fail("read by the host")
    )
    loading.check_finite(params, "x")
    bad = {**params, "embed": params["embed"].at[-1, -1].set(np.nan)}
    with pytest.raises(ValueError, match="x: embed has weights"):
        loading.check_finite(bad, "x")

"""Random damage to everything that a user may hand over, at the parsers, without a model.

Only the documented errors may come (ValueError, FileNotFoundError), in one line, and in
bounded time and memory. ALIGNAX_FUZZ sets how many cases each parser gets.
"""

import gc
import json
import math
import os
import pathlib
import resource
import struct
import sys
import time
from unittest import mock

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attacked_tokenizers import NOW, TURNS

from alignax import plugin
from alignax.models import families, load, stored
from alignax.text import chat_template, tokenizer
from alignax.training import checks, defaults, ranges

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("ALIGNAX_FUZZ", "40"))
SECONDS, BYTES = 10, 2 * 2**30
GGUF = pathlib.Path(tiny.ROOT) / "tests/golden/llama_gguf/model.gguf"
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip

numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**9), math.nan, math.inf, 0.5, -0.0, 1e-300]),
    st.integers(-5, 300), st.floats(),
)  # fmt: skip
leaves = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=4), st.sampled_from(["\ud800", "x" * 2000]))  # fmt: skip
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


def tried(call, *names):
    """What a parser gives, or None where it refuses: in one line, in bounds."""
    before = peak(anew=True)
    begun = time.thread_time()
    try:
        found = call()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text.strip(), text
        assert len(text) < 2000, text[:200]
        assert all(n in text for n in names), text
        found = None
    assert time.thread_time() - begun < SECONDS
    assert peak() - before < BYTES
    return found


def peak(*, anew=False):
    """The most memory of this process, in bytes; from now on where that can be set."""
    try:
        if anew:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:  # not Linux
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_memory_is_seen_below_an_earlier_peak():
    gc.collect()  # what other tests left is not freed in the middle of this one
    held = b"x" * 600_000_000
    del held
    less = mock.patch.object(sys.modules[__name__], "BYTES", 2e8)
    with less, pytest.raises(AssertionError):
        tried(lambda: b"x" * 500_000_000)


def damaged(data, places):
    """Bytes with some of them changed, cut or doubled."""
    out = bytearray(data)
    for place, what, byte in places:
        at = place % max(len(out), 1)
        if what == "cut":
            del out[at:]
        elif what == "double":
            out[at:at] = out[at : at + 64]
        elif out:
            out[at] = byte
    return bytes(out)


damage = st.lists(
    st.tuples(st.integers(0, 10**7), st.sampled_from(["change"] * 8 + ["cut", "double"]), st.integers(0, 255)),
    min_size=1, max_size=6,
)  # fmt: skip
near_the_start = st.lists(
    st.tuples(st.integers(0, 400), st.just("change"), st.sampled_from([0, 1, 2, 8, 9, 255])),
    min_size=1, max_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.family("chatml", tmp_path_factory.mktemp("fuzz"))


def test_settings_of_models(model_folder):
    good = json.loads((model_folder / "config.json").read_text())

    @fuzz
    @given(st.dictionaries(st.sampled_from([*good, "layer_types", "sliding_window", "rope_scaling", "rope_parameters"]), values, min_size=1, max_size=3))  # fmt: skip
    def run(changes):
        found = tried(lambda: families.from_hf({**good, **changes}))
        if found is not None:
            assert found.width * found.num_layers > 0 and found.norm_eps > 0

    run()


def test_bytes_of_settings(model_folder, tmp_path):
    good = (model_folder / "config.json").read_bytes()

    @fuzz
    @given(damage)
    def run(places):
        (tmp_path / "config.json").write_bytes(damaged(good, places))
        tried(lambda: load._read_directory(tmp_path), str(tmp_path))

    run()


def test_safetensors(model_folder, tmp_path):
    good = (model_folder / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"

    @fuzz
    @given(st.one_of(damage, near_the_start), st.one_of(st.none(), st.integers(0, 2**64 - 1)))  # fmt: skip
    def run(places, size):
        data = damaged(good, places)
        path.write_bytes(struct.pack("<Q", size) + data[8:] if size else data)

        def read():
            return {name: reader().shape for name, reader in stored.safetensors(path).items()}  # fmt: skip

        tried(read, path.name)

    run()


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    good, path = GGUF.read_bytes(), tmp_path / "damaged.gguf"

    @fuzz
    @given(st.one_of(damage, near_the_start))
    def run(places):
        path.write_bytes(damaged(good, places))
        tried(lambda: load.load(path) and None, path.name)
        tried(lambda: tokenizer.load(path) and None, path.name)

    run()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(text, tmp_path, name):
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    good = (text / name).read_bytes()
    made = json.loads(good)

    @fuzz
    @given(st.one_of(damage, st.dictionaries(st.sampled_from([*made]), values, min_size=1, max_size=2)))  # fmt: skip
    def run(change):
        new = json.dumps({**made, **change}).encode() if isinstance(change, dict) else damaged(good, change)  # fmt: skip
        (tmp_path / name).write_bytes(new)
        tried(lambda: tokenizer.load(tmp_path) and None, str(tmp_path))

    run()


PIECES = st.sampled_from(
    ["{{ messages[0].content }}", "{{ 'x' * 99999 }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content | trim }}",
     "{% set n = namespace(x=[1]) %}", "{% set n.x = n.x + n.x %}", "{{ n.x | join('ab') }}", "{{ range(99999) | list }}",
     "{{ 9 ** 99 ** 2 }}", "{{ 1 / 0 }}", "{{ m | tojson(indent=9) }}", "{% for i in range(999) %}", "{{ loop.index }}",
     "{% if m.role == 'user' %}", "{% endif %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(f(1)) }}", "{{ f(", ")", "{%",
     "{{ '%9999999s' % m }}", "{{ [] | first }}", "{{ m.content[::-1] | upper | replace('a', 'b' * 9999) }}", "{{ x.y.z }}",
     "{{ messages | map(attribute='content') | join('x' * 999) | indent(99) }}", "{{ raise_exception('no') }}", "text", "\ud800"]
)  # fmt: skip


def test_templates():
    @fuzz
    @given(st.lists(PIECES, min_size=1, max_size=14))
    def run(pieces):
        source = "".join(pieces)

        def render():
            chat_template.check(source, NOW)
            chat_template.is_followed(source)
            return chat_template.render(source, TURNS, True, specials={}, now=NOW)

        tried(render, "template")

    run()


def test_rows(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    keys = st.sampled_from(["prompt", "chosen", "rejected", "label", "messages", "response", "responses", "scores", "id", "x"])  # fmt: skip
    rows = st.lists(st.dictionaries(keys, values, max_size=4), min_size=1, max_size=4)

    @fuzz
    @given(rows, st.one_of(st.just([]), damage))
    def run(rows, places):
        lines = [json.dumps(r) for r in (good, *rows, good)]
        first, *others = lines
        path.write_bytes(f"{first}\n".encode() + damaged("\n".join(others).encode(), places))  # fmt: skip

        def read():
            found = plugin.load_examples({"name": "jsonl", "path": str(path), "split": "train"})  # fmt: skip
            return [found[i] for i in range(len(found))]

        for example in tried(read, path.name) or ():
            assert all(math.isfinite(x) for x in example.feedback)

    run()


def test_numbers_of_a_config():
    numeric = [k for k, v in ranges.keys(defaults.get_config()) if k in ranges.RANGES]
    signs = {k for k in numeric if k.startswith("optim.") or k in ("average", "lora.alpha")}  # fmt: skip

    @fuzz
    @given(st.sampled_from(numeric), st.one_of(numbers, values))
    def run(key, value):
        config = tiny.config("pairs")
        *above, last = key.split(".")
        section = config
        for name in above:
            section = section[name]
        try:
            with section.unlocked(), section.ignore_type():
                section[last] = value
        except (OverflowError, TypeError, ValueError):
            return  # the ConfigDict itself refuses it
        if tried(lambda: checks.check(config) and True, key.rpartition(".")[2]):
            assert math.isfinite(section[last])
            assert section[last] >= 0 or key not in signs

    run()


def test_numbers_of_methods():
    @fuzz
    @given(st.sampled_from(["dpo", "kto", "ppo", "simpo", "rpo", "npo"]), numbers)
    def run(name, value):
        first = next(iter(plugin.load("losses", name).hyper))
        numeric = isinstance(plugin.load("losses", name).hyper[first], float)
        bound = tried(lambda: plugin.load("losses", name, {first: value}), name)
        assert not numeric or bound is None or bound.hyper[first] > 0

    run()

"""metrics.py, events.py and progress.py: what is written can be read back, once."""

import io
import itertools
import json
import math
import statistics
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.reports import events, metrics, progress


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    return [json.loads(row, parse_constant=refuse) for row in text.split("\n") if row]


def test_a_line_holds_step_and_scalars_of_every_kind(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write(3, {"a": jnp.float32(0.5), "b": np.int64(2), "c": 1.25, "d": True})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 3, "a": 0.5, "b": 2.0, "c": 1.25, "d": 1.0}
    ]


def test_nan_and_infinities_are_valid_json_and_read_back(tmp_path):
    values = {"nan": jnp.nan, "up": np.inf, "down": -math.inf}
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, values)
    assert lines(tmp_path / "metrics.jsonl")[0]["nan"] == "nan"
    (row,) = metrics.read(tmp_path)
    assert math.isnan(row["nan"])
    assert (row["up"], row["down"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("value", [jnp.zeros(3), "text", [1.0, 2.0]])
def test_a_metric_that_is_not_a_number_is_named(tmp_path, value):
    with metrics.Writer(tmp_path) as writer, pytest.raises(ValueError, match="'bad'"):
        writer.write(0, {"bad": value})


def test_resume_drops_later_lines_and_a_torn_one(tmp_path, caplog):
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
            writer.samples(step, [{"prompt": "x"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a write
    with metrics.Writer(tmp_path, step=2) as writer:
        writer.write(3, {"loss": -3.0})
    rows = metrics.read(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [
        (1, 1.0),
        (2, 2.0),
        (3, -3.0),
    ]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2]
    assert "step 3" not in (tmp_path / "samples.md").read_text()
    assert "dropped 2 lines past step 2" in caplog.text
    assert "metrics.jsonl:5 is a torn line" in caplog.text


def test_a_new_run_does_not_inherit_lines_of_one_that_never_checkpointed(tmp_path):
    for _ in range(2):
        with metrics.Writer(tmp_path) as writer:
            writer.write(0, {"loss": 1.0})
    assert len(metrics.read(tmp_path)) == 1


def test_garbage_inside_the_file_is_an_error_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        metrics.read(tmp_path)


def test_samples_keep_unicode_line_breaks_and_backticks(tmp_path):
    text = "a\u2028b\x85c ```` d"
    with metrics.Writer(tmp_path) as writer:
        writer.samples(7, [{"prompt": text, "a reward": jnp.float32(0.5)}])
    with metrics.Writer(tmp_path, step=7):
        pass  # a resume reads the rows and writes them again
    (row,) = lines(tmp_path / "samples.jsonl")
    assert row == {"step": 7, "index": 0, "prompt": text, "a reward": 0.5}
    assert list(row)[-1] == "a reward"  # columns stay in the order they were given
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert page.count("## step 7, sample 0") == 1
    assert f"`````text\n{text}\n`````" in page


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.Writer(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        writer.samples(1, [{"prompt": "x"}])
    assert not (tmp_path / "run").exists()


def test_a_remote_workdir_gets_whole_files_and_is_continued(tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(metrics.epath, "Path", lambda name: bucket)
    for step in (1, 2):
        with metrics.Writer("gs://bucket/run", step=step - 1) as writer:
            writer.write(step, {"loss": 1.0})
    assert [row["step"] for row in lines(bucket / "metrics.jsonl")] == [1, 2]
    assert len(list(bucket.glob("events.out.tfevents.*"))) == 2


def test_crc32c_is_castagnolis():
    assert events.crc32c(b"123456789") == 0xE3069283  # the polynomial's check value
    assert events.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def read_events(path):
    """Parses an event file with another project's protocol buffers and checksum."""
    crc32c = pytest.importorskip("tensorboardX.crc32c").crc32c
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")

    def check(data, stored):
        crc = crc32c(data)
        rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
        assert (rotated + 0xA282EAD8) & 0xFFFFFFFF == struct.unpack("<I", stored)[0]

    data, out = io.BytesIO(path.read_bytes()), []
    while header := data.read(8):
        check(header, data.read(4))
        payload = data.read(struct.unpack("<Q", header)[0])
        check(payload, data.read(4))
        out.append(proto.Event.FromString(payload))
    return out


def test_event_file_is_read_back_by_another_reader(tmp_path):
    with metrics.Writer(tmp_path, step=300) as writer:
        writer.write(301, {"train/loss": 0.25, "nan": math.nan})
        writer.write(2**33, {"train/loss": -7.5, "perplexity": 1e300})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    version, start, first, second = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (301, start.session_log.START)
    assert first.step == 301 and first.wall_time > 1.7e9
    values = {value.tag: value.simple_value for value in first.summary.value}
    assert values["train/loss"] == 0.25 and math.isnan(values["nan"])
    assert second.step == 2**33
    assert [value.simple_value for value in second.summary.value] == [-7.5, math.inf]


def test_wilson_equals_published_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20, by the score method
    for (successes, n), (lo, hi) in {
        (81, 263): (0.2553, 0.3662),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
        (29, 29): (0.8830, 1.0),
    }.items():
        interval = metrics.wilson(successes, n)
        assert interval.value == successes / n
        np.testing.assert_allclose(interval[1:], (lo, hi), atol=5e-5)  # 4 digits given


@pytest.mark.parametrize("successes, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="trials"):
        metrics.wilson(successes, n)


def test_bootstrap_agrees_with_exhaustive_resampling():
    values = [0.0, 1.0, 5.0, 2.0]
    means = sorted(statistics.mean(x) for x in itertools.product(values, repeat=4))
    interval = metrics.bootstrap(values, num_resamples=20_000)
    assert interval.value == 2.0
    # the distribution of the mean has 256 atoms: its quantiles are exact, and 20,000 draws put
    # the level within 4 * sqrt(.025 * .975 / 20,000) = .0044 of .025
    for level, got in ((0.025, interval.lo), (0.975, interval.hi)):
        lo, hi = np.quantile(means, (level - 0.0044, level + 0.0044))
        assert lo <= got <= hi


def test_bootstrap_is_decided_by_its_seed():
    values = np.random.default_rng(0).normal(size=50)
    assert metrics.bootstrap(values, seed=1) == metrics.bootstrap(values, seed=1)
    assert metrics.bootstrap(values, seed=1) != metrics.bootstrap(values, seed=2)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan]])
def test_bootstrap_refuses_rows_and_nan(values):
    with pytest.raises(ValueError, match="finite f"):
        metrics.bootstrap(values)


def test_one_prompt_has_no_interval():
    assert metrics.bootstrap([3.0]) == (3.0, -math.inf, math.inf)


def test_interval_is_three_metrics_and_reads_well():
    interval = metrics.Interval(0.5, 0.25, 0.75)
    assert interval.named("x") == {"x": 0.5, "x/lo": 0.25, "x/hi": 0.75}
    assert str(interval) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459),
        ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ],
)  # fmt: skip
def test_peak_is_that_of_the_device(kind, teraflops):
    assert metrics.peak_flops(kind) == teraflops * 1e12


def test_mfu_counts_every_device_and_is_none_on_an_unknown_one():
    h100 = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    cpu = types.SimpleNamespace(device_kind="cpu")
    assert metrics.mfu(989e12, 2.0, [h100, h100]) == 0.25
    assert metrics.mfu(1e12, 1.0, [h100, cpu]) is None
    assert metrics.mfu(1e12, 1.0, []) is None


def test_flops_per_token_names_its_kinds():
    assert metrics.flops_per_token(10, "train") == 60.0
    assert metrics.flops_per_token(10, "forward") == 20.0
    with pytest.raises(ValueError, match="'train', 'forward'"):
        metrics.flops_per_token(10, "backward")


def test_progress_in_a_log_is_plain_lines_that_end_with_the_last_step():
    log = io.StringIO()
    with progress.progress(1000, start=10, file=log, every=3600) as show:
        for step in (11, 12, 1000):
            values = {"train/loss": jnp.float32(0.5), "train/tokens_per_second": 8100.0}
            show(step, {**values, "train/mfu": 0.345})
    first, last = log.getvalue().splitlines()  # step 12 came too soon after step 11
    assert first == "train 11/1000  loss 0.5000  8.10k tok/s  MFU 34.5 %"
    assert last.startswith("train 1000/1000")


def test_progress_extrapolates_from_the_first_step_it_saw(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    with progress.progress(50, file=log, every=0) as show:
        show(20, {})
        show(22, {})  # 2 seconds a step, 28 steps to go
    assert log.getvalue().splitlines()[-1] == "train 22/50  00:56 left"


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    with progress.progress(4, file=screen) as show:
        show(4, {"train/loss": 0.5})
    assert "4/4" in screen.getvalue() and "loss 0.5000" in screen.getvalue()


def test_progress_is_shown_by_process_0_only(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = io.StringIO()
    with progress.progress(4, file=log) as show:
        show(4, {})
    assert log.getvalue() == ""


def test_responses_stand_beside_what_is_said_of_them(tmp_path):
    row = {
        "prompt": ["a", "b"], "responses": ["one", "two ```"], "scores": [0.5, 1.0],
        "truncated": [True, False],
    }  # fmt: skip
    with metrics.Writer(tmp_path) as writer:
        writer.samples(3, [row])
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert "**response 1**: scores 0.5, truncated True\n\n```text\none\n```" in page
    assert (
        "**response 2**: scores 1, truncated False\n\n````text\ntwo ```\n````" in page
    )
    assert page.index("**prompt**") < page.index("**response 1**")


def test_the_mean_of_one_part_is_the_part():
    part = metrics.wilson(7, 10)
    assert metrics.mean_of([part]) == pytest.approx(part)


def test_the_interval_of_a_mean_of_parts_covers():
    """In 95 % of draws of three subsets of different sizes, also where one is all right."""
    rng = np.random.default_rng(0)
    sizes, truth = (20, 60, 200), (0.5, 0.8, 0.98)
    hits = 0
    for _ in range(2000):
        drawn = [
            metrics.wilson(rng.binomial(n, p), n)
            for n, p in zip(sizes, truth, strict=True)
        ]
        found = metrics.mean_of(drawn)
        assert 0 <= found.lo <= found.value <= found.hi <= 1
        hits += found.lo <= np.mean(truth) <= found.hi
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)

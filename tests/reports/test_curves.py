"""plots.py: which metrics land in which panel, and that pictures are drawn headless."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from alignax.evals import pass_at_k
from alignax.reports import curves, metrics


def write(workdir, rows):
    with metrics.Writer(workdir) as writer:
        for step, row in rows:
            writer.write(step, row)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot() saved, by file name."""
    figures = {}
    save = Figure.savefig

    def spy(self, path, **options):
        figures[path.name] = self
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def axes_of(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def labelled(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_")]


TRAIN = {
    "train/loss": 0.5, "train/accuracy": 0.6, "train/margin": 0.1,
    "train/log_ratio_chosen": 0.2, "train/log_ratio_rejected": -0.3,
    "train/grad_norm": 1.0, "train/lr": 1e-4, "train/tokens_per_second": 2e4,
    "train/padding": 0.1, "train/mfu": 0.4,
}  # fmt: skip


def test_every_training_metric_has_its_panel(tmp_path, drawn):
    write(tmp_path, [(1, TRAIN), (2, TRAIN)])
    files = curves.plot(tmp_path)
    assert [file.name for file in files] == ["learning_curves.png", "details.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    learned = axes_of(drawn["learning_curves.png"])
    assert list(learned) == [
        "Loss", "Preference accuracy", "Margin", "Log-ratio to reference", "Throughput"
    ]  # fmt: skip
    assert [line.get_label() for line in labelled(learned["Log-ratio to reference"])] == [
        "chosen", "rejected"
    ]  # fmt: skip
    assert list(axes_of(drawn["details.png"])) == [
        "Gradient norm", "Learning rate", "Padding", "Model FLOPs utilisation"
    ]  # fmt: skip


def test_an_interval_is_drawn_as_a_band_from_lo_to_hi(tmp_path, drawn):
    rows = [
        (step, metrics.Interval(0.6, 0.5, 0.8).named("eval/win_rate/win_rate"))
        for step in (0, 10, 20)
    ]
    write(tmp_path, rows)
    curves.plot(tmp_path)
    (band,) = axes_of(drawn["learning_curves.png"])["Win rate"].collections
    box = band.get_paths()[0].get_extents()
    np.testing.assert_allclose((box.x0, box.x1, box.y0, box.y1), (0, 20, 0.5, 0.8))


def test_a_single_evaluation_is_a_point_with_a_bar(tmp_path, drawn):
    write(tmp_path, [(20, metrics.wilson(9, 10).named("eval/win_rate/win_rate"))])
    curves.plot(tmp_path)
    axes = axes_of(drawn["learning_curves.png"])["Win rate"]
    assert [text.get_text() for text in axes.texts] == ["0.9"]
    assert len(axes.collections) == 1


def test_an_unknown_evaluation_with_an_interval_is_a_learning_curve(tmp_path, drawn):
    odd = metrics.Interval(3.0, 2.0, 4.0).named("eval/honesty/prudence")
    write(tmp_path, [(1, {**odd, "eval/honesty/refusals": 5.0})])
    curves.plot(tmp_path)
    assert list(axes_of(drawn["learning_curves.png"])) == ["Honesty: prudence"]
    assert list(axes_of(drawn["details.png"])) == ["Honesty: refusals"]


def test_training_and_evaluation_share_a_panel(tmp_path, drawn):
    write(tmp_path, [(1, {"eval/held_out/accuracy": 0.7}), (2, TRAIN)])
    curves.plot(tmp_path)
    lines = labelled(axes_of(drawn["learning_curves.png"])["Preference accuracy"])
    assert [line.get_label() for line in lines] == ["train", "held out"]
    assert lines[0].get_color() != lines[1].get_color()


def test_curves_of_one_evaluation_are_told_apart_by_their_metric(tmp_path, drawn):
    keys = ("eval/win_rate/win_rate", "eval/win_rate/strict_wins")
    write(tmp_path, [(1, dict.fromkeys(keys, 0.5))])
    curves.plot(tmp_path)
    lines = labelled(axes_of(drawn["learning_curves.png"])["Win rate"])
    assert [line.get_label() for line in lines] == ["win rate", "strict wins"]


def test_stages_are_drawn_in_the_order_they_were_run(tmp_path, drawn):
    for i, name in enumerate(("sft", "reward_model", "dpo")):
        write(tmp_path / name, [(1, {"train/loss": 1.0})])
        os.utime(tmp_path / name / "metrics.jsonl", (i, i))
    curves.plot(tmp_path)
    texts = [
        text.get_text()
        for axes in drawn["learning_curves.png"].axes
        for text in axes.texts
    ]
    assert texts == ["sft", "reward model", "dpo"]


def test_of_two_lines_of_one_step_the_later_counts():
    rows = [{"step": 2, "x": 1.0}, {"step": 1, "x": 5.0}, {"step": 2, "x": 3.0}]
    steps, values = curves._series(rows, "x")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [5.0, 3.0])


def test_running_mean_is_a_mean_of_neighbours_that_skips_nan():
    np.testing.assert_allclose(
        curves._running_mean(np.array([1.0, 2.0, 6.0, np.nan])), [1.5, 3.0, 4.0, 6.0]
    )


def test_nan_and_infinite_losses_are_drawn_around(tmp_path, drawn):
    losses = [1.0, np.nan, np.inf, 1.0] * 40
    write(tmp_path, [(i, {"train/loss": x}) for i, x in enumerate(losses)])
    assert len(curves.plot(tmp_path)) == 1
    (mean,) = labelled(axes_of(drawn["learning_curves.png"])["Loss"])
    np.testing.assert_allclose(mean.get_ydata(), 1.0)


def test_no_metrics_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        curves.plot(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        curves.plot(tmp_path)


def test_the_command_draws_without_a_display(tmp_path):
    write(tmp_path, [(1, TRAIN)])
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")
    }
    command = [sys.executable, "-m", "alignax.plots"]
    run = subprocess.run(
        [*command, str(tmp_path)], env=environment, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        str(tmp_path / "learning_curves.png"), str(tmp_path / "details.png")
    ]  # fmt: skip
    wrong = subprocess.run(
        [*command, str(tmp_path / "nowhere")],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert wrong.returncode == 1 and "is it a workdir?" in wrong.stderr


def test_right_answers_are_no_preference_accuracy(tmp_path, drawn):
    """The share of right answers has no chance level of a half, whatever its label."""
    right = np.array([[True, False], [False, False]])
    found = pass_at_k.rates(right, None, (1, 2))
    write(tmp_path, [(1, {f"eval/gsm8k/{k}": v for k, v in found.items()})])
    curves.plot(tmp_path)
    titles = [*axes_of(drawn["learning_curves.png"])]
    assert titles == ["Gsm8k: mean at 2", "Gsm8k: pass at 1", "Gsm8k: pass at 2"]

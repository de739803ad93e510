"""Names and hyper-parameters: what is found, and what the error says when it is not."""

import re
import sys
import textwrap
import types

import pytest

from alignax import plugin
from alignax.data import synthetic
from alignax.losses import dpo, reward_model, sft


def test_a_name_is_a_file_in_its_folder():
    assert plugin.load("losses", "dpo").function is dpo.loss
    assert plugin.load("losses", "sft").function is sft.loss
    assert plugin.load("data", "synthetic", {"split": "test"})()[0].id.startswith(
        "synthetic"
    )


@pytest.mark.parametrize("folder", plugin.ROLES)
def test_every_file_in_a_folder_defines_its_function(folder):
    names = plugin.available(folder)
    assert names
    for name in names:
        plugin._find(folder, name)


def test_a_decoder_is_a_guide_or_a_search_and_a_search_is_handed_more():
    assert plugin.load("decoders", "proxy").role == "guide"
    search = plugin.load("decoders", "best_of_n", {"n": 4})
    assert search.role == "search"
    assert search.hyper["n"] == 4
    handed = {"max_new", "judge", "temperature", "eos_ids"}
    assert not handed & {*search.hyper}
    with pytest.raises(ValueError, match=r"best_of_n has no hyper-parameter 'max_new'"):
        plugin.load("decoders", "best_of_n", {"max_new": 4})
    # of an evaluation it is one
    assert "max_new" in plugin.load("evals", "sample", {"reward": "x"}).hyper


def test_defaults_are_filled_in_and_given_values_win():
    bound = plugin.load("losses", "dpo", {"beta": 0.5})
    assert bound.hyper == {"beta": 0.5, "label_smoothing": 0.0}
    assert bound.needs == dpo.NEEDS
    assert (
        plugin.load("losses", "reward_model").needs == reward_model.NEEDS == ("values",)
    )
    assert bound.coupled is False
    assert dict(bound.ema) == {}


def test_a_whole_number_for_a_float_becomes_a_float():
    # the type decides how the number enters a compiled step
    value = plugin.load("losses", "dpo", {"beta": 1}).hyper["beta"]
    assert type(value) is float


def test_unknown_name_lists_the_alternatives_and_the_nearest():
    with pytest.raises(ValueError) as error:
        plugin.load("losses", "dpoo")
    assert str(error.value) == (
        "unknown name 'dpoo' in losses (did you mean 'dpo'?); available: "
        + ", ".join(plugin.available("losses"))
    )


def test_unknown_hyper_parameter_lists_the_functions_own():
    with pytest.raises(ValueError) as error:
        plugin.load("losses", "dpo", {"betta": 0.1})
    assert str(error.value) == (
        "losses.dpo has no hyper-parameter 'betta' (did you mean 'beta'?); it takes "
        "'beta', 'label_smoothing'"
    )


def test_what_the_caller_hands_in_is_no_hyper_parameter():
    with pytest.raises(ValueError, match=r"evals.perplexity has no hyper-parameter 'length'.*it takes none"):  # fmt: skip
        plugin.load("evals", "perplexity", {"length": 8})


@pytest.mark.parametrize("value", ["0.1", True, None, [0.1]])
def test_a_value_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"losses\.dpo: beta=.* should be a number, like its default 0\.1"):  # fmt: skip
        plugin.load("losses", "dpo", {"beta": value})


def test_a_flag_must_be_a_flag():
    with pytest.raises(ValueError, match="swapped='false'"):
        plugin.load("data", "synthetic", {"split": "train", "swapped": "false"})


def test_a_value_without_default_is_asked_for():
    with pytest.raises(ValueError, match=r"data.synthetic needs a value for 'split'"):
        plugin.load("data", "synthetic")


def test_unknown_folder_lists_the_folders():
    with pytest.raises(
        ValueError, match="unknown plug-in folder 'loss'; known: losses,"
    ):
        plugin.load("loss", "dpo")


def test_a_dotted_name_may_be_a_module_or_a_function():
    assert plugin.load("losses", "alignax.losses.dpo").function is dpo.loss
    judge = plugin.load("rewards", "alignax.data.synthetic.judge")
    assert judge.function is synthetic.judge


@pytest.mark.parametrize("name", ["no_such.thing", "alignax.losses.dpo.lossy", "alignax.nowhere.f"])  # fmt: skip
def test_a_dotted_name_that_leads_nowhere_is_named(name):
    with pytest.raises(ValueError) as error:
        plugin.load("losses", name)
    assert str(error.value) == (
        f"cannot import {name!r} (a module with loss(), or a function)"
    )


def test_a_module_without_the_function_is_named():
    with pytest.raises(ValueError, match=r"alignax\.batch defines no loss\(\)"):
        plugin.load("losses", "alignax.batch")


def test_a_plugin_that_cannot_import_something_says_what(tmp_path, monkeypatch):
    """The plug-in exists: 'unknown name' would send the reader to the wrong place."""
    (tmp_path / "outside_loss.py").write_text("import a_library_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_here"):
        plugin.load("losses", "outside_loss.loss")


def test_a_function_written_in_a_notebook_is_found(monkeypatch):
    """A notebook's module is __main__; NEEDS stands beside the function."""
    main = types.ModuleType("__main__")
    code = """
        NEEDS = ("logps", "ref_logps")

        def my_loss(policy, batch, *, margin: float = 2.0):
            return policy, {}
    """
    exec(textwrap.dedent(code), main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    bound = plugin.load("losses", "__main__.my_loss", {"margin": 3})
    assert bound.function is main.my_loss
    assert bound.needs == ("logps", "ref_logps")
    assert bound.hyper == {"margin": 3.0}


def test_a_module_declares_coupling_and_running_means(tmp_path, monkeypatch):
    (tmp_path / "declares.py").write_text(
        "COUPLED = True\nEMA = {'delta': 1.5}\nNEEDS = ('values',)\n"
        "def loss(policy, batch, *, ema, scale: float = 1.0): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    bound = plugin.load("losses", "declares.loss")
    assert (bound.coupled, dict(bound.ema), bound.needs) == (
        True,
        {"delta": 1.5},
        ("values",),
    )
    assert bound.hyper == {"scale": 1.0}  # `ema` is handed in by the step


def test_calling_a_bound_plugin_passes_its_hyper_parameters():
    def f(x, *, a: float = 1.0, b: float = 2.0):
        return x, a, b

    assert plugin.bind(f, {"a": 5})(0, b=7) == (0, 5.0, 7)


@pytest.mark.parametrize(
    ("hyper", "interval"),
    [
        ({"beta": 0.0}, "(0, inf)"),
        ({"beta": -1}, "(0, inf)"),
        ({"beta": float("nan")}, "(0, inf)"),
        ({"label_smoothing": 0.5}, "[0, 0.5)"),
        ({"label_smoothing": -0.1}, "[0, 0.5)"),
    ],
)
def test_a_number_outside_its_range_is_refused(hyper, interval):
    (name,) = hyper
    with pytest.raises(ValueError, match=f"{name}=.* is outside {re.escape(interval)}"):
        plugin.load("losses", "dpo", hyper)


def test_the_ends_of_a_range_are_kept_where_it_is_closed():
    assert plugin.load("losses", "dpo", {"label_smoothing": 0}).hyper["beta"] == 0.1


def test_a_choice_outside_those_of_its_module_is_refused():
    message = r"ctrl: transform='exponent' is not one of identity, log, exp, best_of"
    with pytest.raises(ValueError, match=message):
        plugin.load("shaping", "ctrl", {"transform": "exponent"})


# -- the LMs that fill the needs of a loss


def test_a_pattern_among_needs_stands_for_every_lm_that_matches():
    needs, lms = (
        ("logps", "aligned*_logps", "ref_logps"),
        ["aligned_b", "ref", "aligned"],
    )
    want = ("logps", "aligned_b_logps", "aligned_logps", "ref_logps")
    assert plugin.match_needs(needs, lms) == want
    assert plugin.match_needs(needs, ["ref"]) == needs
    assert plugin.match_needs(("aligned*_logps", "aligned_logps"), lms) == want[1:3]


def test_a_function_of_no_module_is_bound():
    """As one that was made by `exec`, in a notebook."""
    space: dict = {}
    exec("def reward(texts, *, bonus=1.0):\n    return bonus", space)
    space["reward"].__module__ = "no_such_module"
    bound = plugin.bind(space["reward"], {"bonus": 2.0})
    assert (bound.hyper, bound.update, bound.running) == ({"bonus": 2.0}, None, {})

"""A flag that is wrong is answered in one line; one that a method takes is accepted."""

import sys

import pytest
import tiny
from absl import flags
from ml_collections import config_flags

from alignax.training import checks, config_flag, defaults

FILE = (
    "import tiny\n\ndef get_config(arg=''):\n    return tiny.config(arg or 'pairs')\n"
)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Flags -> the config that a program gets."""
    path = tmp_path / "mine.py"
    path.write_text(FILE)

    def read(*words, file=path):
        argv = ["main", "--config", str(file), *words]
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        for kind in (list, type(None)):
            config_flags.register_flag_parser_for_type(kind, config_flag.Literal())
        config_flags.DEFINE_config_file("config", None, flag_values=values)
        values["config"].parser = config_flag.ConfigFile()
        values(argv)
        return values.config

    return read


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("--config.decoder.lo=-1", "decoder.lo", -1),
        ("--config.lms.draft=init", "lms.draft", "init"),
        ("--config.reweight.wpo={}", "reweight.wpo", {}),
        ("--config.reweight.r3.ratio=2.5", "reweight.r3.ratio", 2.5),
        ("--config.generate.reward.name=exact", "generate.reward.name", "exact"),
        ("--config.rollout.reward.name=exact", "rollout.reward.name", "exact"),
        ("--config.evals.sample.max_new=4", "evals.sample.max_new", 4),
        ("--config.loss.label_smoothing=.1", "loss.label_smoothing", 0.1),
        ("--config.loss.beta=1", "loss.beta", 1),
        ("--config.data.seed=2.5", "data.seed", 2.5),  # what binds it refuses it
        ("--config.template.tools=[{'a': 1}]", "template.tools", ({"a": 1},)),
        ("--config.template.enable_thinking=false", "template.enable_thinking", False),
        ("--noconfig.template.x", "template.x", False),
        ("--config.model.sizes.tied=True", "model.sizes.tied", True),
        ("--config.optim.lr=1e-3", "optim.lr", 1e-3),
    ],
)
def test_a_key_of_an_open_section_is_accepted(parse, word, key, value):
    found = parse(word)
    for name in key.split("."):
        found = found[name]
    plain = found.to_dict() if hasattr(found, "to_dict") else found
    if key == "template.tools":
        plain = tuple(dict(x) for x in plain)
    assert plain == value


@pytest.mark.parametrize(
    "word, message",
    [
        ("--config.optim.lrr=1", r"no key 'optim\.lrr'; the nearest: optim\.lr"),
        ("--config.batch_sise=8", r"no key 'batch_sise'; the nearest: batch_size"),
        ("--config.rollout.top_p=.9", r"no key 'rollout\.top_p'.*generate\.top_p"),
        ("--config.generate.top=1", r"no key 'generate\.top'.*generate\.top_[kp]"),
        ("--config.wandb=mine", r"no key 'wandb'; the nearest: trackers"),
        ("--config.wandb.project=mine", r"no key 'wandb'; the nearest: trackers"),
        ("--config.report_to=wandb", r"no key 'report_to'; the nearest: trackers"),
        ("--config.lr=1", r"no key 'lr'; the nearest: .*optim\.lr"),
        ("--config.reweigt.wpo={}", r"no key 'reweigt'; the nearest: reweight"),
        ("--config.stages.a.optim.lr=1", r"no key 'stages'"),
        ("--config.optim.lr.x=1", r"config\.optim\.lr is no section"),
        ("--config.seed.x.y=1", r"config\.seed\.x is no section"),
        ("--config.a[1.x=3", r"--config\.a\[1\.x: Could not parse"),
        ("--config.batch_size=x", r"--config\.batch_size=x: invalid literal"),
        ("--config.loss=5", r"--config\.loss=5: .*not a dict"),
        ("--confg.x=1", "Unknown command line flag 'confg.x'"),
    ],
)
def test_a_key_that_there_is_not_is_answered_with_the_nearest(parse, word, message):
    with pytest.raises(flags.Error, match=message):
        parse(word)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reweight": {"wpo": 5}}, r"config\.reweight\.wpo is 5, expected a section"),
        ({"evals": {"sample": "x"}}, r"config\.evals\.sample is 'x', expected a section"),
        ({"mixture": {"a": [1]}}, r"config\.mixture\.a is .*, expected a section"),
        ({"generate.reward": {"nam": "x"}}, r"config\.generate\.reward has no 'name'"),
        ({"rollout.reward": {"name": 5}}, r"config\.rollout\.reward\.name is 5"),
        ({"decoder.lo": -1}, r"config\.decoder has no name, but \['lo'\]"),
        ({"lms": {"ref": 1}}, r"lms\.ref is 1, expected 'init'"),
        ({"lms": {"ref": ""}}, r"lms\.ref is empty"),
        ({"loss.betta": 0.1}, r"no hyper-parameter 'betta' \(did you mean 'beta'\?\)"),
        ({"reweight": {"wpoo": {}}}, r"unknown name 'wpoo' in reweight \(did you mean 'wpo'"),
        ({"date": "x"}, r"config\.date is 'x', expected a date"),
    ],
)  # fmt: skip
def test_what_no_method_takes_is_refused_where_it_is_bound(changes, message):
    config = tiny.config("pairs")
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        checks.check(config)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config():\n    c = tiny.config()\n    c.optim.lrr = 1\n    return c\n",
         r"line 4: AttributeError.*lrr"),
        ("def get_config():\n    return tiny.config(", r"mine\.py: SyntaxError"),
        ("def get_config():\n    raise ValueError('no')\n", r"line 3: no"),
        ("import nowhere\n", r"line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1\n", r"AttributeError: .*get_config"),
    ],
)  # fmt: skip
def test_an_error_in_a_config_file_names_its_line(parse, tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(f"import tiny\n{text}")
    with pytest.raises(flags.Error, match=message):
        parse()
    with pytest.raises(flags.Error, match="there is no file"):
        parse(file=tmp_path / "nowhere.py")


def test_the_program_prints_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    result = tiny.main("--config", path, "--workdir", tmp_path / "run", "--config.optim.lrr=1")  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: config has no key 'optim.lrr'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["lora", "optim", "checkpoint", "rollout"])
def test_a_section_that_a_file_assigns_whole_keeps_the_defaults_of_other_keys(
    parse, tmp_path, section
):
    """Also of keys that came after the file was written."""
    given = {"lora": "rank=2", "optim": "lr=0.5", "checkpoint": "keep=7", "rollout": "group=3"}  # fmt: skip
    text = FILE.replace("return tiny.config(arg or 'pairs')", f"c = tiny.config('pairs')\n    c.{section} = dict({given[section]})\n    return c")  # fmt: skip
    (tmp_path / "whole.py").write_text(text)
    config = parse(file=tmp_path / "whole.py")
    name, value = given[section].split("=")
    assert config[section][name] == float(value)
    for key, default in defaults.get_config()[section].items():
        assert key == name or config[section][key] == default
    checks.check(config)

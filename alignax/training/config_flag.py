"""The flag --config: a config file, whose keys are set by --config.SECTION.KEY=VALUE.

Sections that a method fills (the open ones of `defaults.get_config`) take any key; what the
method does not take is refused where it is bound. All other sections have fixed keys.
"""

import ast
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

import alignax
from alignax.training import defaults, ranges

NAME = "config"
SHIPPED = pathlib.Path(alignax.__file__).parent / "configs"
# Keys of other programs, and those that do the same here.
ELSEWHERE = {"wandb": "trackers", "tensorboard": "trackers", "report_to": "trackers"}
NO_CONFIGS = ("__init__", "common", "models")  # what the configs there share


class Literal(flags.ArgumentParser):
    """Reads a Python literal; any other text is a string."""

    def parse(self, argument: Any) -> Any:
        """The value of a text."""
        if argument in ("true", "false"):
            return argument == "true"
        try:
            return ast.literal_eval(argument)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return argument


class ConfigFile(flags.ArgumentParser):
    """Loads a config file, and gives its open sections the keys of the command line."""

    def parse(self, path: str) -> ConfigDict:
        """The locked config.

        Raises:
          flags.Error: no such file, an error in it, or a key that there is not; one line.
        """
        config = load(path)
        config.lock()
        for key, text in overrides(sys.argv):
            make_room(config, key, text)
        return config


def define(help: str) -> flags.FlagHolder:
    """Defines the flag --config and the flags of its keys."""
    for kind in (list, type(None)):
        config_flags.register_flag_parser_for_type(kind, Literal())
    holder = config_flags.DEFINE_config_file(NAME, None, help)
    flags.FLAGS[NAME].parser = ConfigFile()
    return holder


def read_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags, for `app.run`; a flag that is wrong is answered in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def load(path: str) -> ConfigDict:
    """The config that `get_config` of a file makes; behind a colon is its argument.

    The modules beside a file can be imported by it, and by dotted names in it.

    Raises:
      flags.Error: no such file, or what went wrong in which of its lines.
    """
    name, *argument = path.split(":", 1)
    file = find(name)
    folder = str(pathlib.Path(file).resolve().parent)
    if folder not in sys.path and pathlib.Path(folder) != SHIPPED.resolve():
        sys.path.append(folder)
    spec: Any = importlib.util.spec_from_file_location(f"{NAME}_file", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look there
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
        if not isinstance(config, ConfigDict):
            raise ValueError(
                f"get_config() gave a {type(config).__name__}, expected a ConfigDict"
            )
        for one in (config, *config.get("stages", {}).values()):
            complete(one)
        return config
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == module.__file__]
        where = f"{file}, line {lines[-1]}" if lines else file
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise flags.Error(f"{where}: {kind}{error}") from error


def complete(config: ConfigDict) -> None:
    """Gives the sections that a file assigned whole the keys that they lack."""
    for key, default in ranges.keys(defaults.get_config()):
        *above, last = key.split(".")
        section: Any = config
        for name in above:
            section = section.get(name) if isinstance(section, ConfigDict) else None
        if above and isinstance(section, ConfigDict) and last not in section:
            with section.unlocked():
                section[last] = default


def find(name: str) -> str:
    """The file of a config: a path, or the name of one that the package brings.

    Raises:
      flags.Error: there is none; the nearest names are listed.
    """
    if pathlib.Path(name).is_file():
        return name
    bare = name.removesuffix(".py")
    shipped = {p.stem: p for p in SHIPPED.glob("*.py") if p.stem not in NO_CONFIGS}
    if bare.removeprefix("configs/") in shipped:  # as in a clone, from any folder
        return str(shipped[bare.removeprefix("configs/")])
    near = difflib.get_close_matches(pathlib.Path(bare).name, shipped, 3)
    hint = f"; alignax brings {', '.join(near)}" if near else ""
    raise flags.Error(f"--{NAME}={name}: there is no file {name}{hint}")


def overrides(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text of its value) of every flag --config.KEY=VALUE or --config.KEY VALUE."""
    for i, word in enumerate(argv):
        if found := re.match(rf"--?(no)?{NAME}\.([^=]*)(=?)(.*)", word, re.DOTALL):
            negated, key, equals, text = found.groups()
            following = "".join(argv[i + 1 : i + 2])
            yield key, "false" if negated else text if equals else following


def make_room(config: ConfigDict, key: str, text: str) -> None:
    """Gives an open section of a config the key that a flag is about to set.

    Raises:
      flags.Error: a section that does not have that key; the nearest ones are named.
    """
    try:
        path = config_path.split(key)
    except ValueError as error:
        raise flags.Error(f"--{NAME}.{key}: {error}") from error
    *above, last = path
    holder: Any = config
    for depth, name in enumerate(above):
        if isinstance(holder, ConfigDict) and name not in holder:
            check_open(config, path, depth)
            with holder.unlocked():
                holder[name] = ConfigDict()
        holder = holder[name] if isinstance(holder, ConfigDict) else None
    if not isinstance(holder, ConfigDict):
        raise flags.Error(f"config.{'.'.join(map(str, above))} is no section: --{NAME}.{key}")  # fmt: skip
    value = Literal().parse(text)
    if last not in holder:
        check_open(config, path, len(above))
        with holder.unlocked():
            holder[last] = tuple(value) if isinstance(value, list) else value
    elif is_open(path, len(above)) and _is_number(holder[last]) and _is_number(value):
        with holder.ignore_type():  # the method says whether it is a whole number
            holder[last] = value


def check_open(config: ConfigDict, path: Sequence[Any], depth: int) -> None:
    """Raises flags.Error if the section above `path[depth]` does not take new keys."""
    if is_open(path, depth):
        return
    *above, last = map(str, path[: depth + 1])
    name, every = ".".join((*above, last)), [k for k, _ in ranges.keys(config)]
    own = {k.rpartition(".")[2]: k for k in every if k.split(".")[:-1] == above}
    near = [ELSEWHERE[last]] if last in ELSEWHERE else []
    near += [own[k] for k in difflib.get_close_matches(last, own, 2)]
    near += [k for k in every if k.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, every, 2)
    names = ", ".join(dict.fromkeys(near or own.values()))
    raise flags.Error(f"config has no key {name!r}; the nearest: {names}")


def is_open(path: Sequence[Any], depth: int) -> bool:
    """Whether the section above `path[depth]` takes any key."""
    names = [*path[:depth]]
    if names[:1] == ["stages"]:  # each is a whole config
        names = names[2:]
    section: Any = defaults.get_config()
    for name in names:
        if not (isinstance(section, ConfigDict) and name in section):
            return False
        section = section[name]
        if isinstance(section, ConfigDict) and not section.is_locked:
            return True
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Rules of structure that are real: broken, they cost a reader or a user something."""

import ast
import collections
import io
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest
import tiny

ROOT = tiny.ROOT
PACKAGE = ROOT / "alignax"
MODULES = sorted(PACKAGE.rglob("*.py"))
LEAVES = [
    path
    for folder in (
        "losses",
        "reweight",
        "shaping",
        "evals",
        "rewards",
        "data",
        "theory",
        "decoders",
    )
    for path in sorted((PACKAGE / folder).glob("*.py"))
    if path.stem != "__init__"
]


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Modules of alignax that a file imports, wherever the import stands in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}: relative import"
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= inner | {node.module}
    return {m for m in found if m.split(".")[0] == "alignax"}


def modules(path):
    """The files of alignax behind `imports`, as 'models/load' or 'batch'."""
    files = {str(p.relative_to(PACKAGE).with_suffix("")) for p in MODULES}
    dotted = {m.removeprefix("alignax.").replace(".", "/") for m in imports(path)}
    packages = {f"{m}/__init__" for m in dotted}
    # a package is also named by every import of a file in it: only that file counts
    inside = {m.rpartition("/")[0] for m in dotted & files}
    return (dotted & files) | {
        m for m in packages & files if m.removesuffix("/__init__") not in inside
    }


# An import may only point to something above it in this list, or into the same folder.
# A line holds files on top of the package, or folders; those of one line stand in order.
LAYERS = (
    ("batch", "masked", "pairs", "lists", "ratios", "value_heads", "plugin"),
    ("theory", "losses", "reweight", "shaping", "records", "data"),
    ("models",),
    ("logprob",),
    ("reports",),
    ("runs",),
    ("text",),
    ("inputs",),
    ("sampling",),
    ("search",),
    ("reward_functions",),
    ("rewards", "decoders", "evals"),
    ("rollouts",),
    ("training",),
    ("respond",),
    ("preflight",),
    ("api", "main", "plots", "export", "sweep", "frontier", "harness", "cli"),
)
ORDER = [room for layer in LAYERS for room in layer]
TOP = {room for room in ORDER if not (PACKAGE / room).is_dir()} | {"__init__"}
PLUGINS = ("losses", "reweight", "shaping", "data", "rewards", "decoders", "evals")
FOLDERS = sorted(room for room in ORDER if (PACKAGE / room).is_dir())


def room(path):
    """The file on top, or the folder, that a module is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(path):
    """What a file imports from below itself in the order of layers."""
    own = room(path)
    if (
        own == "__init__"
    ):  # names of the public surface, imported when they are asked for
        return []
    others = {m.split("/")[0] for m in modules(path)} - {own}
    return [m for m in sorted(others) if ORDER.index(m) > ORDER.index(own)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_upwards(path):
    assert room(path) in {*ORDER, "__init__"}, f"{name(path)} is in no layer"
    assert wrong_imports(path) == []


def test_a_file_in_the_wrong_folder_is_found(tmp_path, monkeypatch):
    package = tmp_path / "alignax"
    for folder in ("models", "training"):
        (package / folder).mkdir(parents=True)
    for name in ("training/step.py", "training/__init__.py", "models/other.py"):
        (package / name).write_text("")
    wrong = package / "models" / "helper.py"
    monkeypatch.setitem(globals(), "PACKAGE", package)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "MODULES", sorted(package.rglob("*.py")))
    for text in (
        "from alignax.training import step",
        "import alignax.training.step",
        "from alignax import training",
        "import alignax.training as t",
        "def f():\n    from alignax.training.step import x",
    ):
        wrong.write_text(f"{text}\n")
        assert wrong_imports(wrong) == ["training"], text
    wrong.write_text("from alignax.models import other\nimport jax\n")
    assert wrong_imports(wrong) == []


def test_only_programs_import_the_loop():
    for path in MODULES:
        if "training/loop" in modules(path):
            assert path.stem in ("main", "api"), name(path)


def test_what_lies_on_top_is_vocabulary_kernel_or_program():
    files = {p.stem for p in PACKAGE.glob("*.py")}
    assert files == TOP
    assert len(files) <= 16
    inits = PACKAGE.glob("*/__init__.py")  # configs is a link, so that wheels have them
    folders = {p.parent.name for p in inits if not p.parent.is_symlink()}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_how_to_read_it(folder):
    path = PACKAGE / folder
    tree = ast.parse((path / "__init__.py").read_text())
    text = ast.get_docstring(tree)
    assert text
    files = [p.stem for p in path.glob("*.py") if p.stem != "__init__"]
    order = re.search(r"Reading order: (.*)\.", text, re.S)
    assert order
    if folder in PLUGINS:  # some of the methods, to begin with
        assert {*files} & {*re.findall(r"\w+", order[1])}
        return
    assert 3 <= len(files) <= 20
    assert len(tree.body) == 1, "only the loader of a plug-in kind lives in __init__"
    named = set(re.findall(r"\w+", re.sub(r"\([^()]*\)", "", order[1])))
    assert set(files) <= named, f"not in the reading order: {set(files) - named}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "losses").glob("*.py")), ids=name)
def test_a_loss_sees_no_model(path):
    vocabulary = {"batch", "value_heads", "masked", "pairs", "lists", "ratios"}
    assert modules(path) <= vocabulary


@pytest.mark.parametrize("path", sorted((PACKAGE / "theory").glob("*.py")), ids=name)
def test_theory_is_numpy_alone(path):
    assert imports(path) == set()
    assert not re.search(
        r"^\s*(import|from) (jax|optax|flax)\b", path.read_text(), re.M
    )


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=name)
def test_models_know_only_the_batch(path):
    assert all(m == "batch" or m.startswith("models/") for m in modules(path))


# Functions that are longer than 80 lines of code, and why they may be.
LONG = {
    ("alignax/training/defaults.py", "get_config"): "the table of keys",
}
MOST_LINES = 80


def lengths(path):
    """(function, lines of code) of a file; docstrings, comments and blanks do not count."""
    text = path.read_text()
    skipped = (
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
        tokenize.DEDENT, tokenize.ENDMARKER,
    )  # fmt: skip
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code |= {*range(token.start[0], token.end[0] + 1)}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            code -= {*range(first.lineno, first.end_lineno + 1)}
    return [
        (node.name, len(code & {*range(node.lineno, node.end_lineno + 1)}))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_function_fits_on_a_screen(path):
    long = [(f, n) for f, n in lengths(path) if n > MOST_LINES]
    assert [x for x in long if (name(path), x[0]) not in LONG] == []


def test_the_length_of_a_function_is_its_code(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        'def f():\n    """Two\n    lines."""\n\n    # why\n    x = (\n        1\n    )\n    return x\n'
    )
    assert lengths(path) == [("f", 5)]


def test_linen_stays_in_models():
    for path in MODULES:
        if path.parent.name != "models":
            assert not re.search(r"\b(linen|flax)\b", path.read_text(), re.I), name(
                path
            )


def calls(path, *attributes):
    """(enclosing function, attribute) of every call of one of `attributes`."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Attribute) and node.attr in attributes:
            found.append((function, node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    return found


NORMALISERS = {
    # logits that already exist, [N, V]: the public helper of the kernel
    ("alignax/logprob.py", "token_logps", "logsumexp"),
    # a few verified positions, [N, K, V]: a sampler needs the whole row
    ("alignax/logprob.py", "rows", "log_softmax"),
    # [N, V] of one decoding step: the distribution after the temperature
    ("alignax/sampling/response_state.py", "sampled_logps", "log_softmax"),
}


def test_logits_are_normalised_in_the_kernel_alone():
    found = {
        (name(path), function, call)
        for path in MODULES
        for function, call in calls(path, "log_softmax", "logsumexp")
    }
    assert found == NORMALISERS


def test_tokens_are_shifted_in_the_kernel_alone():
    found = {(name(p), f) for p in MODULES for f, _ in calls(p, "roll")}
    assert found == {("alignax/logprob.py", "_read")}


@pytest.mark.parametrize("path", LEAVES, ids=name)
def test_a_leaf_names_its_source(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    # the user's own files, and what the project makes itself, have no source
    if name(path) not in ("alignax/data/jsonl.py", "alignax/data/synthetic.py"):
        assert re.search(r"https://\S+", text)
    if path.parent.name in ("losses", "evals"):
        assert re.search(r"^Differs from the (paper|papers|source): ", text, re.M)


@pytest.mark.parametrize("path", LEAVES, ids=name)
def test_a_leaf_has_its_tests(path):
    folder = path.parent.name
    tests = ROOT / "tests" / folder
    own = [tests / f"test_{path.stem}{end}.py" for end in ("", f"_{folder}")]
    shared = tests / f"test_{folder}.py"
    assert any(p.exists() for p in own) or re.search(
        rf"\b{path.stem}\b", shared.read_text()
    )


def test_test_files_outside_packages_have_names_of_their_own():
    # pytest imports them by their file name alone: the second one would end the session
    names = collections.Counter(
        p.name
        for p in (ROOT / "tests").rglob("test_*.py")
        if not (p.parent / "__init__.py").exists()
    )
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "losses").glob("[!_]*.py")), ids=name
)
def test_a_loss_has_a_config(path):
    users = [
        p for p in (ROOT / "configs").glob("*.py") if f'"{path.stem}"' in p.read_text()
    ]
    assert users


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert path.stem not in ("utils", "common", "helpers", "types")
    assert len(path.relative_to(PACKAGE).parts) <= 2


def test_importing_everything_loads_no_heavy_library(tmp_path):
    dotted = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in MODULES
    ]
    code = (
        f"import importlib, sys\nfor m in {dotted!r}: importlib.import_module(m)\n"
        "heavy = 'torch tensorflow transformers wandb datasets gguf matplotlib.pyplot'\n"
        "print(*[m for m in heavy.split() if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=tiny.environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == []


def tracked():
    """The files of the repository; of a tarball, all that are not products."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        return [
            ROOT / p for p in listed.stdout.split("\0") if p and (ROOT / p).is_file()
        ]
    products = r"(^|/)(\.venv\w*|\.git|\.hypothesis|runs|build|dist|__pycache__|\.\w+_cache|[\w-]+\.egg-info)(/|$)"  # fmt: skip
    everything = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in everything if not re.search(products, name(p))]


# The home of a user or the scratch of a machine; a page of the web may have such a path.
LOCAL = re.compile(r"(?<![\w.:/~$}])/" + r"(work|root|home|Users|scratch|mnt|data)/\w")
HOSTS = re.compile(r"(pypi|pythonhosted)\.org|localhost:\d")


def test_no_file_mentions_the_machine_it_was_written_on():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (LOCAL, HOSTS):
            found += [f"{name(path)}: {m.group()}" for m in pattern.finditer(text)]
    assert found == []


def test_the_patterns_find_what_they_should():
    for prefix in ("work", "home", "Users"):
        assert LOCAL.search(f'path = "/{prefix}/me/file"')
    assert not LOCAL.search("https://example.com/home/page and runs/work/x")
    assert not LOCAL.search("~/.cache and $HOME/root/x")


def test_everything_that_is_tracked_is_found():
    names = {name(p) for p in tracked()}
    assert {"setup.cfg", "alignax/training/loop.py", "configs/dpo.py"} <= names
    assert pathlib.Path(__file__).name == "test_architecture.py"

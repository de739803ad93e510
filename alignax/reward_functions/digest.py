"""A digest of a reward's code: what runs save, to know a reward again.

The code is the module of the function, since it may call others there. Comments,
docstrings and the layout of the source do not count.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

# saved_digest of a reward -> the digest of its source at commit 2628565.
EARLIER: dict[str, str] = {
    "6a0459135f010bb8": "28455d78bbf2763d",  # constraints
    "91989e8a084975b2": "c071a8295fc8a781",  # ensemble
    "ded57b2fd2be0487": "7607432f0f4c40e8",  # model
    "e33aeb694ca0fedd": "c98c8c18b9c2a89f",  # relevance
}


# code_digest or module_digest of a reward -> that of earlier code with the same numbers,
# which runs have saved. An entry holds only as long as the code is the same.
SAME: dict[str, str] = {
    "19b1725ad287a2df": "6a0459135f010bb8",  # constraints: takes texts alone
    "2df2e4b9d29e912b": "91989e8a084975b2",  # ensemble: None of a member, and their rewards
    "c71533d7836eba5d": "ded57b2fd2be0487",  # model: text for another tokenizer
    "b9efcba23ab03b08": "e33aeb694ca0fedd",  # relevance: takes no LMs
}


def module_digest(function: Callable) -> str:
    """16 hex digits of the code of a function and its module, which it may call.

    Of a function of a program that runs, or without a source, `code_digest`. Of code that
    changed without its numbers, the digest from before.
    """
    if isinstance(function, functools.partial):
        return _of_partial(function, module_digest)
    module = inspect.getmodule(inspect.unwrap(function))
    if module is None or module.__name__ == "__main__":
        return saved_digest(function)
    try:
        whole = _of_tree(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return saved_digest(function)
    now = _digest(f"{whole} {code_digest(function)}")
    return SAME.get(now, now)


def saved_digest(function: Callable) -> str:
    """`code_digest`; of code that changed without its numbers, the digest from before.

    Runs of the first days of 2026-12 saved it.
    """
    now = code_digest(function)
    return SAME.get(now, now)


def first_digest(function: Callable) -> str:
    """What runs before 2026-12 saved, in which comments and docstrings count.

    The docstrings of this package's rewards have changed since, so EARLIER holds the
    digest of their source at the time; the source of any other function is read again.
    """
    return EARLIER.get(saved_digest(function)) or source_digest(function)


# Of a reward, from the one that is saved now to the oldest one.
DIGESTS = (module_digest, saved_digest, first_digest)


def code_digest(function: Callable) -> str:
    """16 hex digits of a function's syntax tree without comments and docstrings."""
    if isinstance(function, functools.partial):
        return _of_partial(function, code_digest)
    try:
        return _of_tree(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # defined interactively, or a lambda in the middle of an expression
        return source_digest(function)


def _of_partial(function: functools.partial, digest: Callable[[Callable], str]) -> str:
    keywords = sorted(function.keywords.items())
    return _digest(repr((digest(function.func), function.args, keywords)))


def _of_tree(source: str) -> str:
    """Of the syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return _digest(repr(_plain_tree(tree)))


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _plain_tree(node: Any) -> Any:
    """A syntax tree as tuples, without the empty fields that Python versions add."""
    if isinstance(node, list):
        return tuple(map(_plain_tree, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        (k, _plain_tree(v)) for k, v in ast.iter_fields(node) if v not in (None, [])
    ]
    return (type(node).__name__, *fields)


def source_digest(function: Callable) -> str:
    """16 hex digits of a function's source, in which comments and docstrings count."""
    return _digest(_source(function))


def _source(function: Callable) -> str:
    """The source text, or the byte code where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # defined interactively, or no plain function
        made: Any = getattr(function, "__code__", None)
        return made.co_code.hex() if made else type(function).__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

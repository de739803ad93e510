"""Chat templates: a conversation rendered to one string by jinja2, in a sandbox.

The rendering is a `tracked_text.Tracked`: each character that a message gave knows its
message and key, and text inside `{% generation %}` is marked.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from alignax.batch import Message
from alignax.models.json_object import one_line
from alignax.text import template_limits, tracked_text
from alignax.text.tracked_text import Tracked

# For conversations where a tokenizer has no template (bytes, base models); `tokenize`
# inserts EOS after each assistant turn.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ m.role | capitalize }}: {{ (m.content or '') | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one key
MARK = (-1, "generation")  # source of text inside {% generation %}
SCOPES = ("_loop_vars", "_block_vars")  # that compiled templates add to calls
# What a template may raise on a row that it was not written for.
REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError,
    AttributeError, AssertionError, RuntimeError, MemoryError, SyntaxError,
)  # fmt: skip


def render(
    template: str | None, messages: Sequence[Message], add_generation_prompt: bool, *,
    specials: Mapping[str, str], now: datetime.datetime,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:  # fmt: skip
    """The conversation as one string with spans (see `tracked_text`).

    Args:
      template: jinja2 source, or None for PLAIN_TEMPLATE.
      messages: the turns; all keys of a message reach the template.
      add_generation_prompt: whether an assistant turn is opened at the end.
      specials: special tokens as templates name them, e.g. {'eos_token': '</s>'}.
      now: the date that the template's `strftime_now` gives.
      variables: what else the template gets, e.g. 'tools', 'enable_thinking'.

    Raises:
      ValueError: the template refuses the messages; its message is included.
    """
    given = {"tools": None, "documents": None, **specials, **variables}
    try:
        with template_limits.limited():
            return _compile(template or PLAIN_TEMPLATE, now).render(
                messages=[_track(i, m) for i, m in enumerate(messages)],
                add_generation_prompt=add_generation_prompt,
                **given,
            )
    except REFUSALS as e:
        roles = [m.get("role") for m in messages]
        why = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"chat template refuses turns {roles}: {why}") from e


def _track(index: int, message: Message) -> Message:
    """The message with texts that know it; the role stays a plain str.

    A content of None is left out, and thoughts have the names that templates read, as in
    transformers' `apply_chat_template`.
    """
    out = {}
    for key, value in message.items():
        if key == "role":
            out[key] = value
        elif key == "content" and value is None:
            continue
        elif key == "content" and isinstance(value, list):
            out[key] = [_track_part(index, part) for part in value]
        else:
            out[key] = tracked_text.track(value, (index, key))
    begun = message.get("prefill")
    if begun and isinstance(message.get("content"), str):
        given = tracked_text.track(begun, (index, "prefill"))
        rest = message["content"][len(begun) :]
        out["content"] = given + tracked_text.track(rest, (index, "content"))
    thought = next((out[k] for k in THOUGHTS if out.get(k) is not None), None)
    if thought is not None:
        out = {"thinking": thought, **out, "reasoning_content": thought}
    return out


def _track_part(index: int, part: Any) -> Any:
    source = (index, "content")
    if not isinstance(part, Mapping):
        return tracked_text.track(part, source)
    return {
        k: v if k == "type" else tracked_text.track(v, source) for k, v in part.items()
    }


class _Code(jinja2.compiler.CodeGenerator):
    """Compiles `~` to a concatenation that keeps spans; loops and macros tick."""

    def visit_For(self, node, frame):
        self._tick(node)
        super().visit_For(node, frame)

    def visit_Macro(self, node, frame):
        self._tick(node)
        super().visit_Macro(node, frame)

    def _tick(self, node):
        tick = jinja2.nodes.EnvironmentAttribute("tick")
        call = jinja2.nodes.Call(tick, [], [], None, None)
        node.body.insert(0, jinja2.nodes.ExprStmt(call))

    def visit_Concat(self, node, frame):
        self.write("environment.concat((")
        for each in node.nodes:
            self.write("str(")
            self.visit(each, frame)
            self.write("), ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the text that the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller):
        text = caller()
        return Tracked(text, (*tracked_text.spans(text), (0, len(text), MARK)))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox that templates of downloaded models run in; it keeps spans."""

    code_generator_class = _Code
    intercepted_binops = frozenset(template_limits.OPERATORS)

    def getattr(self, obj, attribute):
        # A key of a dict first, where it cannot be meant as a method.
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)

    def getitem(self, obj, argument):
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        _read(argument)
        return super().getitem(obj, argument)

    def tick(self):
        return template_limits.tick()

    def call(self, context, function, *args, **kwargs):
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            given = {k: v for k, v in kwargs.items() if k not in SCOPES}
            template_limits.growing(function.__name__, owner, *args, **given)
        if isinstance(owner, str) and type(owner) is not Tracked:
            if function.__name__ == "join":
                return tracked_text.join(owner, *args)
            out = super().call(context, function, *args, **kwargs)
            # jinja2 also hands over all variables of a loop, which are no arguments.
            given = {k: v for k, v in kwargs.items() if k not in SCOPES}
            return _from(out, args, given)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        template_limits.operands(operator, left, right)
        out = template_limits.made(super().call_binop(context, operator, left, right))
        if operator != "%":
            return out
        return _from(out, left, right) if type(out) is str else out

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__

        @functools.wraps(wrapped)
        def tracked(*args, **kwargs):
            template_limits.formatted(form)
            return _from(str(wrapped(*args, **kwargs)), form, args, kwargs)

        return tracked


def _from(out: Any, *made_of: Any) -> Any:
    """A text that was made in a way that is not followed, with all sources of it."""
    if isinstance(out, str):
        return tracked_text.as_whole(tracked_text.plain(out), *made_of)
    _read(*made_of)
    return out


def _read(*values: Any) -> None:
    """Counts as an inspection of the texts in nested values, if there are any."""
    tracked_text.as_whole("", *values)


def _as_whole(function: Callable) -> Callable:
    """A filter whose result is as a whole from all of its arguments."""

    @functools.wraps(function)
    def tracked(*args, **kwargs):
        return _from(function(*args, **kwargs), args, kwargs)

    return tracked


@jinja2.pass_environment
def _join(env, value, d="", attribute=None):
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(env, attribute), value)
    parts, d = list(map(_text, template_limits.ticking(value))), _text(d)
    size = tracked_text.size
    template_limits.check(sum(map(size, parts)) + size(d) * len(parts))
    return tracked_text.join(d, parts)


def _trim(value, chars=None):
    _read(chars)
    return _text(value).strip(chars)


def _replace(s, old, new, count=-1):
    s, old, new = _text(s), _text(old), _text(new)
    if type(s) is Tracked:
        return s.replace(old, new, count)
    _read(old)
    return _from(s.replace(old, tracked_text.plain(new), count), new)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Templates mean plain JSON; jinja2's own filter escapes HTML.
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent,
        separators=separators, sort_keys=sort_keys,
    )  # fmt: skip
    return tracked_text.as_whole(text, value, indent, separators)


# What hands texts on, or reads them in a way that `tracked_text.inspections` counts.
_FOLLOWED = frozenset(
    {
        "trim", "default", "d", "string", "safe", "tojson", "length", "count", "first", "last",
        "join", "list", "replace", "upper", "lower", "title", "capitalize", "indent", "e",
        "escape", "forceescape", "wordwrap", "truncate", "format", "striptags", "urlencode",
        "urlize", "center", "items", "dictsort", "reverse", "sort", "unique", "max", "min",
    }
)  # fmt: skip
_TESTS = frozenset(
    {
        "defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "true",
        "false", "boolean", "number", "integer", "float", "callable", "odd", "even",
        "divisibleby", "sameas", "eq", "equalto", "==", "ne", "!=", "lt", "gt", "le", "ge",
    }
)  # fmt: skip


@functools.lru_cache(maxsize=32)
def is_followed(source: str | None) -> bool:
    """Whether everything by which a template may read a text counts as an inspection."""
    tree = _tree(source)
    if any(node.name not in _FOLLOWED for node in tree.find_all(jinja2.nodes.Filter)):
        return False
    if any(node.name not in _TESTS for node in tree.find_all(jinja2.nodes.Test)):
        return False
    if any(tree.find_all(jinja2.nodes.EvalContextModifier)):  # {% autoescape %}
        return False
    # A text that is looked for in another one is read without a trace.
    return all(
        isinstance(left, jinja2.nodes.Const)
        for node in tree.find_all(jinja2.nodes.Compare)
        for left, operand in zip(
            (node.expr, *(o.expr for o in node.ops)), node.ops, strict=False
        )
        if operand.op in ("in", "notin")
    )


def is_marked(source: str | None) -> bool:
    """Whether a template marks what the assistant writes."""
    return re.search(r"\{%[-+]?\s*generation\b", source or "") is not None


@functools.lru_cache(maxsize=32)
def variables(source: str | None) -> frozenset[str]:
    """The names that a template reads from what it is given."""
    return frozenset(jinja2.meta.find_undeclared_variables(_tree(source)))


def check(source: str | None, now: datetime.datetime) -> None:
    """Raises ValueError for a template that is none, or that has what no template may."""
    try:
        with template_limits.limited():
            _compile(source or PLAIN_TEMPLATE, now)
        _tree(source)
    except REFUSALS as error:
        raise ValueError(
            f"the chat template cannot be read: {one_line(error)}"
        ) from error


def _tree(source: str | None) -> Any:
    return _environment().parse(source or PLAIN_TEMPLATE)


@functools.lru_cache(maxsize=32)
def _compile(source: str, now: datetime.datetime) -> jinja2.Template:
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    if len(source) > template_limits.SOURCE:
        raise ValueError(f"it has more than {template_limits.SOURCE} characters")
    env = _environment()
    env.concat = lambda parts: template_limits.made(
        tracked_text.concat(_counted(parts))
    )
    for name in (
        "indent", "wordwrap", "truncate", "format", "title", "striptags",
        "e", "escape", "forceescape", "urlencode", "urlize", "center",
    ):  # fmt: skip
        env.filters[name] = _as_whole(env.filters[name])
    env.filters |= {
        "join": _join, "replace": _replace, "tojson": _tojson, "trim": _trim,
    }  # fmt: skip
    env.filters["safe"] = lambda value: value  # nothing is escaped
    template_limits.limit_filters(env.filters)
    del env.globals["lipsum"]  # at random
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: _from(now.strftime(form), form)
    return env.from_string(source)


def _counted(parts):
    """The parts of a text, none after they have become too large."""
    size = 0
    for part in parts:
        size += tracked_text.size(part)
        template_limits.check(size)
        yield part


def _environment() -> Any:
    # Templates come with downloaded models: they run in a sandbox.
    return _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

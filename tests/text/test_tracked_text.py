"""Tracked texts are the texts themselves; their spans, and what counts as reading them."""

import datetime
import functools
import json

import chat_families as families
import jinja2.ext
import jinja2.sandbox
import pytest
from chat_families import FAMILIES, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax.text import chat_template, tracked_text
from alignax.text.tracked_text import Tracked, plain, spans, track

some = settings(max_examples=40, deadline=None, derandomize=True)
NOW = datetime.datetime(2024, 7, 26)


# -- the same characters as jinja2 gives with plain strings


class Unmarked(jinja2.ext.Extension):
    """`{% generation %}` that marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(
            self.call_method("_same"), [], [], body
        ).set_lineno(line)

    def _same(self, caller):
        return caller()


@functools.cache
def compiled(source):
    """The template as transformers compiles it."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, Unmarked],
    )  # fmt: skip
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": refuse, "strftime_now": NOW.strftime}
    return env.from_string(source)


def untracked(source, messages, open_turn=False, specials=None, **variables):
    """The rendering as transformers makes it, of plain strings; None if refused."""
    given = {"tools": None, "documents": None, **(specials or {}), **variables}
    said = []
    for message in messages:
        m = {k: v for k, v in message.items() if k != "content" or v is not None}
        names = chat_template.THOUGHTS
        thought = next((m[k] for k in names if m.get(k) is not None), None)
        if thought is not None:
            m = {"thinking": thought, **m, "reasoning_content": thought}
        said.append(m)
    try:
        return compiled(source).render(
            messages=said, add_generation_prompt=open_turn, **given
        )
    except chat_template.REFUSALS:
        return None


def tracked(source, messages, open_turn=False, specials=None, **variables):
    """Our rendering, as a plain string; None if refused."""
    try:
        text = chat_template.render(
            source, messages, open_turn, specials=specials or {}, now=NOW,
            variables=variables,
        )  # fmt: skip
    except ValueError:
        return None
    return plain(text)


CALLS = st.sampled_from(
    [
        [{"type": "function", "function": {"name": "add", "arguments": {"a": "é", "b": 5}}}],
        [{"function": {"name": "x<y", "arguments": '{"a": 1}'}}] * 2,
        [{"name": "add", "arguments": {}}],
        [],
    ]
)  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "assistant", "tool", "system"]),
        "content": st.one_of(texts(), texts(), st.none()),
    },
    optional={
        "reasoning_content": texts(), "thinking": texts(), "tool_calls": CALLS,
        "name": texts(), "tool_call_id": st.just("c1"),
    },
)  # fmt: skip


def alternating(messages):
    """With roles that take turns, as many templates want them."""
    return [{**m, "role": ("user", "assistant")[i % 2]} for i, m in enumerate(messages)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendering_has_the_characters_of_plain_strings(family):
    source, specials = families.source(family), families.load(family).specials

    @some
    @given(
        st.lists(MESSAGES, min_size=1, max_size=5), st.booleans(), st.booleans(),
        st.sampled_from([{}, {"enable_thinking": False}, {"tools": [{"type": "function"}]}]),
    )  # fmt: skip
    def check(messages, turns, open_turn, variables):
        said = alternating(messages) if turns else messages
        given = (source, said, open_turn, specials)
        assert tracked(*given, **variables) == untracked(*given, **variables)

    check()


# `c` is the content of a message, `d` that of the one before it, `a` is 'abc'.
SAME = [
    "{{ c % d }}", "{{ '%s|%s' % (c, d) }}", "{{ '%s' % c }}", "{{ '%r' % [c] }}",
    "{{ '%s' | format(c) }}", "{{ c | format(d) }}", "{{ '{}-{}'.format(c, d) }}",
    "{{ '{x}'.format(x=c) }}", "{{ '{0:>9}'.format(c) }}", "{{ c.format(d) }}",
    "{{ '{x}'.format_map({'x': c}) }}", "{{ c ~ d ~ 1 ~ none }}", "{{ c + d + 'x' }}",
    "{{ 'x' + c }}", "{{ c * 2 }}{{ 2 * c }}{{ c * 0 }}", "{{ c + 1 }}",
    "{% macro f(x, y='') %}<{{ x }}{{ y | trim }}>{% endmacro %}{{ f(c) ~ f(d, c) | upper }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{{ c }}{% endcall %}",
    "{% set x %}{{ c }}{{ d }}{% endset %}{{ x[1:] }}{{ x | length }}",
    "{% set x | trim | upper %} {{ c }} {% endset %}{{ x }}",
    "{% filter upper %}{{ c }}{% endfilter %}",
    "{% for x in c %}{{ x }}{{ loop.index }}{{ '!' if loop.changed(x) }}{% endfor %}",
    "{% for x in c.split() %}{{ x }},{% else %}none{% endfor %}",
    "{{ c[0] }}", "{{ c[-1] }}", "{{ c[:3] }}{{ c[3:] }}", "{{ c[::-1] }}", "{{ c[::2] }}",
    "{{ c[5:2] }}{{ c[-3:-1] }}", "{{ c.replace('o', d) }}", "{{ c.replace('', '-') }}",
    "{{ c.replace('l', '', 1) }}", "{{ c | replace('o', d, 1) }}", "{{ c.replace('x', 5) }}",
    "{{ a | replace('b', c) }}", "{{ a | replace(c, 'x') }}", "{{ 5 | replace('5', c) }}",
    "{{ c.split('</think>') | join('|') }}", "{{ c.split('<think>', 1)[-1] }}",
    "{{ c.rsplit('e', 1)[0] }}", "{{ c.split(None, 1) | join('|') }}", "{{ c.split('') }}",
    "{{ c.rsplit(None, 1) | join('|') }}", "{{ c.splitlines() | join('|') }}",
    "{{ c.splitlines(true) | join('|') }}", "{{ c.partition('l') | join('|') }}",
    "{{ c.rpartition('l') | join('|') }}", "{{ c.strip('H\n') }}", "{{ c | trim('x ') }}",
    "{{ c.lstrip() }}|{{ c.rstrip() }}|{{ c.lstrip('\n') }}|{{ c.rstrip('x') }}",
    "{{ c.removeprefix('<think>') }}{{ c.removesuffix('</think>') }}{{ c.removesuffix('') }}",
    "{{ c.upper() }}{{ c.lower() }}{{ c.title() }}{{ c.capitalize() }}{{ c.swapcase() }}",
    "{{ c.casefold() }}{{ c | title }}{{ c | capitalize }}{{ c | lower }}",
    "{{ c.center(9) }}{{ c.ljust(9, '.') }}{{ c.rjust(9) }}{{ c.zfill(9) }}",
    "{{ c.expandtabs(3) }}{{ c.translate({120: 'yy'}) }}{{ c | center(20) }}",
    "{{ c.join(['x', 'y', d]) }}", "{{ ', '.join([c, d]) }}", "{{ ', '.join([c, 1]) }}",
    "{{ c.join([1]) }}", "{{ [c, 1, none, d] | join(', ') }}", "{{ [1, 2] | join(c) }}",
    "{{ [c, d] | join(1) }}", "{{ [{'x': {'y': c}}] | join(',', attribute='x.y') }}",
    "{{ [[c, d]] | join(attribute=1) }}", "{{ [{'x': c}] | map(attribute='x') | join }}",
    "{{ c | join('.') }}", "{{ a.join(c) }}", "{{ {'x': c, c: d} | tojson }}",
    "{{ c | tojson(indent=2) }}{{ [c] | tojson(ensure_ascii=true) }}", "{{ [c, d] }}",
    "{{ {'x': c} }}", "{{ [c] | string }}", "{{ messages }}", "{{ c | pprint }}",
    "{{ c | e }}", "{{ c | escape ~ '<b>' }}", "{{ c | forceescape }}", "{{ c | safe }}",
    "{{ (c | safe) ~ '<b>' }}", "{{ c | urlencode }}", "{{ c | urlize }}",
    "{{ c | striptags }}", "{{ c | indent(2) }}", "{{ c | indent(2, true) }}",
    "{{ c | wordwrap(5) }}", "{{ c | truncate(5) }}", "{{ c | wordcount }}",
    "{{ c | default('x', true) }}", "{{ nothing | default(c) }}", "{{ c | int }}",
    "{{ c | float }}", "{{ c | first }}", "{{ c | last }}", "{{ c | reverse }}",
    "{{ c | list }}", "{{ c | sort | join }}", "{{ c | unique | join }}", "{{ c | max }}",
    "{{ [c, d] | sort | join('|') }}", "{{ [c, d] | min }}", "{{ c | batch(3) | list }}",
    "{{ c | slice(2) | list }}", "{{ [c, d] | select | list }}", "{{ [c] | map('upper') | join }}",
    "{{ messages | groupby('content') | length }}", "{{ messages | map(attribute='content') | join }}",
    "{{ messages | selectattr('content') | list | length }}", "{{ c | xmlattr }}",
    "{{ messages[0] | dictsort(by='value') }}", "{{ messages[0] | items | list }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}",
    "{{ 'x' in c }}{{ c in 'Hello' }}{{ c in [d] }}{{ c not in d }}{{ c in {c: 1} }}",
    "{{ c == d }}{{ c != 'x' }}{{ c < d }}{{ c >= 'a' }}{{ 'x' == c }}{{ c == none }}",
    "{{ 'yes' if c else 'no' }}{{ c or 'none' }}{{ c and 'some' }}{{ not c }}",
    "{{ c is string }}{{ c is sequence }}{{ c is iterable }}{{ c is mapping }}{{ c is none }}",
    "{{ c is lower }}{{ c is upper }}{{ c is eq('x') }}{{ c is in('xyz') }}{{ 'x' is in(c) }}",
    "{{ c is number }}{{ c is true }}{{ c is defined }}{{ c.nothing is defined }}",
    "{{ c.isspace() }}{{ c.isdigit() }}{{ c.isalpha() }}{{ c.startswith(('H', ' ')) }}",
    "{{ c.endswith('</think>') }}{{ c.find('x') }}{{ c.count('e') }}{{ c.index('e') }}",
    "{{ c.encode() }}{{ c.encode('utf-16') | length }}", "{{ {'x': 1}[c] }}", "{{ loop[c] }}",
    "{{ {c: 'x'}[c] }}", "{{ a[c] }}", "{{ c['upper']() }}", "{{ c.x }}",
    "{% set ns = namespace(x=c) %}{% set ns.x = ns.x ~ d %}{{ ns.x }}",
    "{{ raise_exception(c) }}", "{{ strftime_now(c) }}", "{{ dict(x=c).x }}",
    "{% set x, y = c.split('l', 1) %}{{ y }}{{ x }}", "{{ c | length }}{{ c | count }}",
    "{{ a.startswith(c) }}{{ a.strip(c) }}{{ a.split(c) }}{{ a.replace(c, d) }}{{ a.find(c) }}",
    "{{ cycler(c, d).next() }}{% set j = joiner(c) %}{{ j() }}{{ j() }}", "{{ range(c) }}",
    "{% if c.strip() %}{{ c.strip() + d.lstrip('\n') }}{% endif %}", "{{ (c, d) }}",
    "{{ c.format(a) }}", "{{ (c[:0] + '{0.upper}').format(a) }}",
    "{{ (c[:0] ~ '{0.__class__}').format(a) }}", "{{ c.__class__ }}", "{{ c._spans }}",
    "{{ '{0.__class__.__mro__}'.format(c) }}", "{{ ('{0}' ~ c[:0]).format_map({'0': a}) }}",
]  # fmt: skip
EACH = (
    "{% set a = 'abc' %}{% for m in messages %}{% set c = m.content %}"
    "{% set d = messages[loop.index0 - 1].content %}EXPRESSION;{% endfor %}"
)
CONTENTS = [
    "", " ", "x", "Hello", "hello there\nyou ", "  a\tb  ", "\n\nx\r\ny\n", "7", "3.5", "l",
    "<think>\nwhy\n</think>\n\nHi", "100% of %s", "{} {0} {x}", "<b>&amp;</b>", "ß é 東 a\u0301",
    "abc", "x\u2028y\x0bz\x1c", "ŉ ǆ İ", "%d", "upper", "index", "utf-8 https://x.org",
]  # fmt: skip


@pytest.mark.parametrize("expression", SAME)
def test_every_construct_gives_the_same_characters(expression):
    source = EACH.replace("EXPRESSION", expression)
    for i, content in enumerate(CONTENTS):
        for other in (CONTENTS[i - 1], "x"):
            said = [families.user(other), families.assistant(content)]
            assert tracked(source, said) == untracked(source, said), said


def test_no_method_of_str_is_forgotten():
    """Each is either of `Tracked`, or gives nothing of the characters."""
    harmless = {
        "__class__", "__dir__", "__doc__", "__delattr__", "__getattribute__", "__getnewargs__",
        "__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__",
        "__setattr__", "__sizeof__", "__subclasshook__", "__getstate__", "maketrans",
    }  # fmt: skip
    own = set(vars(Tracked))
    assert set(dir(str)) - own - harmless == set()


# -- spans


C, D = (0, "content"), (1, "content")


def given_by(text, source):
    """The characters that a source gave, in their places."""
    return [plain(text)[a:b] for a, b, s in spans(text) if s == source]


EXACT = {
    "slices": (lambda t: t[2:5], ["llo"]),
    "from the end": (lambda t: t[-3:], ["ld "]),
    "one": (lambda t: t[1], ["e"]),
    "last": (lambda t: t[-1], [" "]),
    "strip": (lambda t: "<" + t.strip() + ">", ["hello wörld"]),
    "lstrip": (lambda t: t.lstrip("he"), ["llo wörld "]),
    "rstrip": (lambda t: t.rstrip(), ["hello wörld"]),
    "split": (lambda t: t.split()[1], ["wörld"]),
    "split at": (lambda t: t.split("l")[3], ["d "]),
    "rsplit": (lambda t: t.rsplit("o", 1)[0], ["hell"]),
    "partition": (lambda t: "".join(("",)) + t.partition("o")[2], [" wörld "]),
    "replace": (lambda t: t.replace("l", "L"), ["heLLo wörLd "]),
    "upper": (lambda t: t.upper(), ["HELLO WÖRLD "]),
    "removeprefix": (lambda t: t.removeprefix("hell"), ["o wörld "]),
    "removesuffix": (lambda t: t.removesuffix("d "), ["hello wörl"]),
    "times": (lambda t: t[:2] * 2 + ".", ["hehe"]),
    "in front": (lambda t: "é" + t, ["hello wörld "]),
    "join": (lambda t: t[:1].join(["-", "-", "-"]), ["h", "h"]),
    "lines": (lambda t: track("a\nbc\n", C).splitlines()[1], ["bc"]),
    "%": (lambda t: "<%s>" % t, ["<hello wörld >"]),  # noqa: UP031
}  # fmt: skip


@pytest.mark.parametrize("change", EXACT)
def test_spans_are_of_the_characters_of_the_source(change):
    function, expected = EXACT[change]
    assert given_by(function(track("hello wörld ", C)), C) == expected


def test_what_a_replacement_puts_in_has_its_own_source():
    text = track("a-b", C).replace("-", track("+", D))
    assert (plain(text), given_by(text, D)) == ("a+b", ["+"])
    assert given_by(text, C) == ["a", "b"]


@some
@given(st.data())
def test_every_character_keeps_its_source_through_exact_changes(data):
    """Characters of one source are digits here, of the other letters, of none others."""
    digits = data.draw(st.text("123\n ", max_size=6))
    letters = data.draw(st.text("abc\n ", max_size=6))
    text = "." + track(digits, C) + "." + track(letters, D) + "."
    for _ in range(data.draw(st.integers(1, 4))):
        text = data.draw(st.sampled_from(CHANGES))(text)
        text = text if isinstance(text, str) else "".join(())
    shown = plain(text)
    for a, b, source in spans(text):
        assert 0 <= a <= b <= len(shown)
        assert set(shown[a:b]) <= set("123_\n " if source == C else "abc_\n ")
    for wanted, source in (("123", C), ("abc", D)):
        covered = {k for a, b, s in spans(text) if s == source for k in range(a, b)}
        assert {k for k, c in enumerate(shown) if c in wanted} <= covered


CHANGES = [
    lambda t: t[1:], lambda t: t[:-1], lambda t: t[2:6], lambda t: t.strip(),
    lambda t: t.lstrip("."), lambda t: t.rstrip(".\n"), lambda t: t + "!", lambda t: "?" + t,
    lambda t: tracked_text.join("-", t.split(".")), lambda t: (t.split() or [""])[-1],
    lambda t: (t.rsplit(None, 1) or [""])[0], lambda t: tracked_text.join("|", t.splitlines()),
    lambda t: tracked_text.concat(t.splitlines(True)), lambda t: t.partition("1")[2],
    lambda t: t.rpartition("a")[0], lambda t: t.replace("2", "_"), lambda t: t * 2,
    lambda t: t.removeprefix("."), lambda t: tracked_text.concat(list(t)),
]  # fmt: skip


@pytest.mark.parametrize(
    "plainly", ["''.strip()", "'abc'.upper()", "'{}'.format(1)", "'a'.split('b')[0]"]
)
def test_a_plain_text_has_no_source_whatever_the_loop_holds(plainly):
    """Compiled calls in a loop also get the variables of the loop."""
    source = (
        "{% for m in messages %}{% set c = m.content %}{% set a = 'x' %}"
        "<{{ EXPRESSION }}>{{ c }}{% endfor %}"
    ).replace("EXPRESSION", plainly)
    text = chat_template.render(
        source, [families.user("one")], False, specials={}, now=NOW
    )
    assert given_by(text, C) == ["one"]


def test_an_empty_text_has_a_place():
    for text in ("<" + track("", C) + ">", "<" + track(" \n", C).strip() + ">"):
        assert spans(text) == ((1, 1, C),)
    assert spans(track("abc", C)[:0]) == ((0, 0, C),)
    assert spans("<" + track("abc", C)[:0] + track("x", C)) == ((1, 2, C),)


# -- what reads a text


def counted(function):
    before = tracked_text.inspections()
    function()
    return tracked_text.inspections() > before


# Each tells something of the characters of `c` (or of `m`, which holds it).
READ = [
    "{{ 'x' in c }}", "{{ c in 'abc' }}", "{{ c in ['x'] }}", "{{ c in {'x': 1} }}",
    "{{ 'x' in [c] }}", "{{ 'x' in {c: 1} }}", "{{ 'a' < 'b' in c }}", "{{ 0 < 1 != c in 'x' }}",
    "{{ c == 'x' }}", "{{ 'x' == c }}", "{{ c != d }}", "{{ c < 'x' }}", "{{ 'x' >= c }}",
    "{{ [c] == ['x'] }}", "{{ m == {'role': m.role, 'content': 'x'} }}", "{{ (c,) < ('x',) }}",
    "{{ 1 if c }}", "{{ c or 1 }}", "{{ c and 1 }}", "{{ not c }}", "{{ c | default(1, true) }}",
    "{{ c is in('abc') }}", "{{ 'x' is in(c) }}", "{{ c is lower }}", "{{ c is upper }}",
    "{{ c is eq('x') }}", "{{ c is gt('x') }}", "{{ c is sequence }}", "{{ c is odd }}",
    "{{ c | int }}", "{{ c | float }}", "{{ c | length }}", "{{ c | count }}", "{{ c | wordcount }}",
    "{{ [c] | select | list | length }}", "{{ [c] | reject | list | length }}",
    "{{ [m] | selectattr('content') | list | length }}", "{{ [c] | map('length') | list }}",
    "{{ [m] | rejectattr('content', 'eq', 'x') | list | length }}", "{{ [c] | map('int') | list }}",
    "{{ messages | groupby('content') | length }}", "{{ c | batch(2) | list | length }}",
    "{{ c | slice(2) | list | length }}", "{{ c | first }}", "{{ c | last }}", "{{ c | list | length }}",
    "{{ c | sort | length }}", "{{ [c, d] | sort }}", "{{ [c] | unique | list | length }}",
    "{{ [c, d] | max }}", "{{ [c, d] | min }}", "{{ messages | sort(attribute='content') | length }}",
    "{{ m | dictsort(by='value') | length }}", "{{ c | reverse }}", "{{ c | random }}",
    "{{ c | hash if hash is defined else c | length }}", "{{ c | filesizeformat }}", "{{ c | round }}",
    "{{ [c] | sum(start='') }}", "{{ c | abs }}", "{{ c[0] }}", "{{ c[:2] }}", "{{ c[-1:] }}",
    "{{ {'x': 1}[c] }}", "{{ {'x': 1}.get(c) }}", "{{ {c: 1} | length }}", "{{ loop[c] }}",
    "{{ a[c] }}", "{{ m[c] }}", "{{ namespace(x=1)[c] }}", "{{ a | attr(c) }}",
    "{% for x in c %}1{% endfor %}", "{% set x, y = c %}1", "{{ 1 if loop.changed(c) }}",
    "{{ c.startswith('x') }}", "{{ c.endswith('x') }}", "{{ c.find('x') }}", "{{ c.count('x') }}",
    "{{ c.isspace() }}", "{{ c.split() | length }}", "{{ c.split('x') | length }}",
    "{{ c.splitlines() | length }}", "{{ c.partition('x')[0] }}", "{{ c.replace('x', 'y') }}",
    "{{ c.strip('x') }}", "{{ c | trim('x') }}", "{{ c | upper }}", "{{ c.title() }}",
    "{{ c.removeprefix('x') }}", "{{ c.removesuffix('x') }}", "{{ c.encode() | length }}",
    "{{ c.center(9) }}", "{{ c.zfill(9) }}", "{{ c.translate({120: 'y'}) }}", "{{ c.format() }}",
    "{{ c % 1 }}", "{{ '%s' % c }}", "{{ '{:>9}'.format(c) }}", "{{ '%s' | format(c) }}",
    "{{ a.startswith(c) }}", "{{ a.strip(c) }}", "{{ a.split(c) | length }}", "{{ a.find(c) }}",
    "{{ a.replace(c, 'x') }}", "{{ a.count(c) }}", "{{ a.join(c) }}", "{{ a.endswith((c, 'x')) }}",
    "{{ a.removeprefix(c) }}", "{{ a.encode(c) }}", "{{ a | replace(c, 'x') }}", "{{ a | trim(c) }}",
    "{{ 5 | replace(c, 'x') }}", "{{ [c] }}", "{{ m }}", "{{ [c] | string | length }}",
    "{{ messages | string }}", "{{ c | tojson }}", "{{ messages | tojson }}", "{{ [c] ~ '' }}",
    "{{ 5 | tojson(indent=c) }}", "{{ {'a': 1} | tojson(separators=(c, c)) }}", "{{ '%r' % [c] }}",
    "{{ strftime_now(c) }}", "{{ c | pprint }}", "{{ c | xmlattr }}", "{{ c | indent }}",
    "{{ c | wordwrap(5) }}", "{{ c | truncate(2) }}", "{{ c | urlencode }}", "{{ c | e }}",
    "{{ c | striptags }}", "{{ c | center(9) }}", "{{ a | indent(c) }}", "{{ 1 if (c ~ 'x').strip() }}",
    "{{ c.strip() | length }}", "{{ (c ~ 'x') | trim }}", "{{ range(c | length) | list }}",
    "{{ messages.index(messages[-1]) }}", "{{ messages | map(attribute='content') | list | length }}",
    "{{ lipsum(html=c) }}", "{{ a | default(a, c) }}", "{{ [a] | sort(reverse=c) }}",
    "{% macro f() %}{{ kwargs | length }}{% endmacro %}{{ f(**{c: 1}) }}",
    "{% set ns = namespace() %}{% set ns.x = c %}{{ 1 if ns.x }}", "{{ [m] | join(attribute=c) }}",
    "{% autoescape true %}{{ c }}{% endautoescape %}",
]  # fmt: skip


@pytest.mark.parametrize("expression", READ)
def test_what_reads_a_text_is_counted_or_not_followed(expression):
    source = EACH.replace("EXPRESSION", "{{ c }}" + expression)
    if not chat_template.is_followed(source):
        return
    said = [families.user("one "), families.user("one ")]  # equal: nothing stops early
    quiet = EACH.replace("EXPRESSION", "{{ c }}")
    refused = tracked(source, said) is None  # which no skeleton is made of either
    assert refused or reads(source, said) > reads(quiet, said)


def reads(source, said):
    before, real = [0], tracked_text._inspect

    def count():
        before[0] += 1
        real()

    tracked_text._inspect = count
    try:
        tracked(source, said)
    finally:
        tracked_text._inspect = real
    return before[0]


# Each only hands the text on.
WRITTEN = [
    "{{ c }}", "{{ c ~ 'x' }}", "{{ 'x' + c + 'y' }}", "{{ c | trim }}", "{{ c.strip() }}",
    "{{ c.lstrip() }}", "{% set x = c %}{{ x }}", "{{ c if c is string }}", "{{ c if c is defined }}",
    "{{ [c, 'x'] | join(',') }}", "{{ '-'.join([c]) }}", "{{ c | string }}", "{{ c | safe }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c) }}", "{{ nothing | default(c) }}",
    "{% set ns = namespace(x=c) %}{{ ns.x }}", "{{ c is not none }}", "{{ a | replace('b', 'c') }}",
]  # fmt: skip


@pytest.mark.parametrize("expression", WRITTEN)
def test_what_only_writes_a_text_is_not_counted(expression):
    source = "{% for m in messages %}{% set c = m.content %}EXPRESSION{% endfor %}"
    source = "{% set a = 'abc' %}" + source.replace("EXPRESSION", expression)
    assert chat_template.is_followed(source)
    assert not reads(source, [families.user("one"), families.assistant("two")])


def test_pickled_and_copied_texts_are_plain():
    assert json.dumps(track("é", C)) == '"\\u00e9"'
    assert type(plain(track("x", C))) is str
    assert type(track({"x": ["y"]}, C)["x"][0]) is Tracked

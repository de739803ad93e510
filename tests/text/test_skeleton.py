"""A rendering filled into a skeleton is the rendering itself, whatever the texts are."""

import datetime
import itertools

import chat_families as families
import pytest
from chat_families import FAMILIES, assistant, system, texts, user
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax.batch import Example
from alignax.text import chat_template, skeleton, tracked_text
from alignax.text.dialogues import Dialogues
from alignax.text.turns import Reader

some = settings(max_examples=30, deadline=None, derandomize=True)
ROLES = ("system", "user", "assistant", "tool")
ALL = (*FAMILIES, "bytes")
NEVER = ("gemma", "bytes")  # they ask whether a content is a list, or is none
WITH_SKELETONS = [f for f in ALL if f not in NEVER]
NOW = datetime.datetime(2024, 7, 26)


def reader(family, followed):
    text = families.load(family)
    return Reader(
        lambda messages, open_turn: text._tracked(messages, open_turn, {}),
        [text.encoder.name_of(i) for i in sorted(text.eos_ids)],
        text.end_of_turn, followed=followed,
    )  # fmt: skip


def read(one, messages, open_turn):
    try:
        got = one.read(messages, open_turn=open_turn)
    except ValueError as e:
        return str(e)
    return got._replace(protected=sorted(got.protected))


def dialogues(family, followed):
    text = families.load(family)
    return Dialogues(
        text.encoder, text._tracked, text.reading, templated=bool(text.chat_template),
        eos_ids=text.eos_ids, eos_id=text.eos_id, bos_id=text.bos_id,
        add_bos=text.add_bos, end_of_turn=text.end_of_turn, followed=followed,
        marked=chat_template.is_marked(text.chat_template), variables=(),
    )  # fmt: skip


def ids(one, example):
    try:
        return one.ids(one.render(example))
    except ValueError as e:
        return str(e)


def filled(one, said, open_turn):
    """The reading by a skeleton; None where there is none."""
    return one._filled(said, open_turn)


@pytest.mark.parametrize("family", ALL)
def test_every_sequence_of_roles_is_read_alike(family):
    """All sequences of up to three turns, some of four and five; contents go round."""
    contents = itertools.cycle((*families.EDGES, *families.PIECES[12:], "Hello\n", "x"))
    fast, slow = reader(family, True), reader(family, False)
    made = 0
    for n in range(1, 6):
        every = {4: 3, 5: 11}.get(n, 1)
        for roles in itertools.islice(
            itertools.product(ROLES, repeat=n), 0, None, every
        ):
            said = [families.role(r, next(contents)) for r in roles]
            if (got := filled(fast, said, n % 2 == 0)) is not None:
                assert got == read(slow, said, n % 2 == 0), said
                made += 1
    assert (made > 0) == (family in WITH_SKELETONS)


@pytest.mark.parametrize("family", WITH_SKELETONS)
def test_every_text_is_read_alike(family):
    fast, slow = reader(family, True), reader(family, False)

    @some
    @given(st.lists(st.tuples(st.sampled_from(ROLES), texts()), min_size=1, max_size=5))
    def check(turns):
        said = [families.role(r, text) for r, text in turns]
        for open_turn in (False, True):
            if (got := filled(fast, said, open_turn)) is not None:
                assert got == read(slow, said, open_turn)

    check()


@pytest.mark.parametrize("family", ALL)
def test_rows_have_the_same_ids(family):
    both = dialogues(family, True), dialogues(family, False)

    @some
    @given(
        st.none() | texts(), st.lists(texts(), min_size=1, max_size=3),
        st.lists(texts(), min_size=1, max_size=2),
    )  # fmt: skip
    def check(rules, said, answers):
        turns = [(user, assistant)[k % 2](text) for k, text in enumerate(said)]
        turns = turns[: len(turns) - (len(turns) + 1) % 2]
        prompt = [*([] if rules is None else [system(rules)]), *turns]
        row = Example("x", prompt, answers)
        fast, slow = (ids(one, row) for one in both)
        assert fast == slow

    check()


# -- which templates have one


def build(source, roles=("user", "assistant")):
    def render(messages, open_turn):
        return chat_template.render(
            source, messages, open_turn, specials={}, now=NOW, variables={}
        )

    return skeleton.build(render, roles, False)


LOOP = "{% for m in messages %}<EXPRESSION>{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "left", "right"),
    [
        ("{{ m.content }}", False, False),
        ("{{ m['content'] | trim }}", True, True),
        ("{{ m.role ~ m.content.strip() }}", True, True),
        ("{{ m.content.lstrip() }}", True, False),
        ("{{ '\\n' + m.content.rstrip() + '\\n' }}", False, True),
        ("{% set x = m.content %}{{ x }}", False, False),
        ("{% set x %}{{ m.content }}{% endset %}{{ x }}", False, False),
    ],
)
def test_texts_that_are_only_written(expression, left, right):
    found = build(LOOP.replace("EXPRESSION", expression))
    holes = [x for x in found if isinstance(x, skeleton.Hole)]
    assert [tuple(h) for h in holes] == [(0, left, right), (1, left, right)]


READING = {
    "truth": "{% if m.content %}{{ m.content }}{% endif %}",
    "or": "{{ m.content or '' }}",
    "length": "{{ m.content | length }}{{ m.content }}",
    "comparison": "{{ 'y' if m.content == 'x' }}{{ m.content }}",
    "part": "{{ m.content[:100] }}",
    "split": "{{ m.content.split('</think>')[-1] }}",
    "startswith": "{{ 1 if m.content.startswith('x') }}{{ m.content }}",
    "in": "{{ 1 if 'x' in m.content }}{{ m.content }}",
    "upper": "{{ m.content | upper }}",
    "json": "{{ m.content | tojson }}",
    "twice": "{{ m.content }}{{ m.content }}",
    "left out": "",
    "only blanks off": "{{ (m.content ~ 'x') | trim }}",
    "list": "{{ m.content }}{{ [m.content] }}",
    "message": "{{ m.content }}{{ m }}",
    "message as a string": "{{ m.content }}{{ m | string }}",
    "marked": "{% generation %}{{ m.content }}{% endgeneration %}",
}


@pytest.mark.parametrize("expression", READING.values(), ids=list(READING))
def test_no_skeleton_where_a_text_is_read(expression):
    assert build(LOOP.replace("EXPRESSION", expression)) is None


def test_no_skeleton_of_refused_messages():
    assert build("{{ raise_exception('no') }}") is None


def test_blanks_go_where_the_template_takes_them_off():
    pieces = ("<", skeleton.Hole(0, True, False), ">", skeleton.Hole(1, False, True))
    text, places = skeleton.fill(pieces, [" a ", " b "])
    assert text == "<a > b"
    assert [text[slice(*p)] for p in places] == ["a ", " b"]


def test_counting_is_what_tells():
    before = tracked_text.inspections()
    text = tracked_text.track("abc", (0, "content"))
    assert tracked_text.plain("<" + text + ">") == "<abc>"
    assert tracked_text.inspections() == before
    assert text == "abc"
    assert tracked_text.inspections() > before

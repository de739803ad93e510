"""Forms of rows: the table of data/README.md, and rows that are almost of a form."""

import copy
import json
import re

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from alignax.batch import form
from alignax.records import row_forms, values

README = (tiny.ROOT / "alignax" / "data" / "README.md").read_text()
TABLE = [
    [part.strip() for part in line.strip("|").split(" | ")]
    for line in README.splitlines()
    if line.startswith("|") and "`{" in line
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def system(text):
    return {"role": "system", "content": text}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def parse(row, **names):
    return row_forms.parse("f:1", row, names)


@pytest.mark.parametrize("name, row, read", TABLE, ids=[row[0] for row in TABLE])
def test_every_form_of_the_table_is_read_as_it_says(name, row, read):
    del name
    example = parse(json.loads(row.strip("`")))
    want = json.loads(read.strip("`"))
    got = {
        "prompt": example.prompt,
        "responses": list(example.responses),
        "feedback": list(example.feedback),
        "form": form(example),
        "columns": dict(example.columns),
        "template": dict(example.template),
    }
    assert {k: v for k, v in got.items() if v or k in ("prompt", "responses")} == want


def test_every_key_that_is_read_is_in_the_table_or_below_it():
    assert len(TABLE) >= 20
    text = README.replace("also with `_`", "chosen_rating rejected_rating")
    assert [key for key in row_forms.KEYS if not re.search(rf"\b{key}\b", text)] == [
        "conversation"  # also read, but not to be recommended
    ]


def test_a_row_is_not_changed_by_reading_it():
    row = {"messages": [user("a"), assistant("b", name=None)], "tools": "[]", "x": [1]}
    before = copy.deepcopy(row)
    parse(row)
    assert row == before


# -- prompts that responses repeat


@pytest.mark.parametrize("prompt", ["p", [user("p")]])
@pytest.mark.parametrize("before", [[], [system("s")]])
def test_the_prompt_may_be_repeated_with_and_without_a_system_turn(prompt, before):
    sides = {
        "chosen": [*before, user("p"), assistant("c")],
        "rejected": [*before, user("p"), assistant("r")],
    }
    example = parse({"prompt": prompt, **sides})
    assert example.prompt == ([*before, user("p")] if before else prompt)
    assert example.responses == [[assistant("c")], [assistant("r")]]
    single = parse({"prompt": prompt, "completion": sides["chosen"]})
    assert (single.prompt, single.responses) == (example.prompt, [[assistant("c")]])
    group = parse({"prompt": prompt, "responses": [*sides.values()], "scores": [1, 2]})
    assert (group.prompt, group.responses) == (example.prompt, example.responses)


def test_only_one_side_may_repeat_the_prompt():
    example = parse({**PAIR, "chosen": [system("s"), user("p"), assistant("c")]})
    assert example.prompt == [system("s"), user("p")]
    assert example.responses == [[assistant("c")], "r"]
    other = [system("t"), user("p"), assistant("r")]
    with pytest.raises(ValueError, match=r"begins with other turns than another"):
        parse({**PAIR, "chosen": [system("s"), user("p"), assistant("c")], "rejected": other})  # fmt: skip


def test_the_prompt_of_lists_with_a_system_turn_is_found_in_lists_without_one():
    prompt = [system("s"), user("p")]
    example = parse({**PAIR, "prompt": prompt, "chosen": [user("p"), assistant("c")]})
    assert example.prompt == prompt
    assert example.responses == [[assistant("c")], "r"]


def test_a_string_prompt_may_be_a_later_turn_of_what_repeats_it():
    before = [user("a"), assistant("b"), user("p")]
    example = parse({**PAIR, "chosen": [*before, assistant("c")], "rejected": [*before, assistant("r")]})  # fmt: skip
    assert example.prompt == before
    assert example.responses == [[assistant("c")], [assistant("r")]]


def test_a_turn_behind_an_answer_is_no_repeated_prompt():
    turns = [assistant("c"), user("p"), assistant("d")]
    assert parse({**PAIR, "chosen": turns}).responses[0] == turns


def test_a_pair_wins_over_messages_which_are_kept_if_they_say_more():
    sides = {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}  # fmt: skip
    for messages in ([user("p"), assistant("c")], [user("p"), assistant("r")], [user("p")]):  # fmt: skip
        for prompt in ({}, {"prompt": "p"}):
            example = parse({**prompt, **sides, "messages": messages})
            assert example.responses == [[assistant("c")], [assistant("r")]]
            assert example.columns == {}
    other = [user("p"), assistant("third")]
    example = parse({**sides, "messages": other})
    assert json.loads(example.columns["messages"]) == other


def test_a_dialogue_may_be_the_prompt_of_texts():
    turns = [system("s"), user("p")]
    assert parse({"messages": turns, "chosen": "c", "rejected": "r"}).prompt == turns
    ended = [*turns, assistant("c")]
    assert parse({"messages": ended, "chosen": "c", "rejected": "r"}).prompt == turns
    assert parse({"conversations": turns, "response": "c"}).prompt == turns
    group = parse({"messages": turns, "responses": ["c", "r"], "scores": [2, 1]})
    assert (group.prompt, group.form) == (turns, "groups")


def test_keys_that_mean_something_else_are_columns():
    asked = {"prompt": "p", "conversations": [{"from": "human", "value": "x"}]}
    exchanges = [{"input": "a", "output": "b"}]
    sides = {
        "chosen": [user("p"), assistant("c")],
        "rejected": [user("p"), assistant("r")],
    }
    turns = [user("a"), assistant("b")]
    for row, key, many in (
        (asked, "conversations", 0),
        ({**asked, "response": "c"}, "conversations", 1),
        ({"prompt": "p", "response": "c", "conversation": "c1"}, "conversation", 1),
        ({**sides, "conversation": exchanges}, "conversation", 2),
        ({**sides, "messages": [{"text": "a"}]}, "messages", 2),
        ({"prompt": "p", "completions": ["a", "b"]}, "completions", 0),
        ({"messages": turns, "label": 7}, "label", 1),
        ({"messages": turns, "label": "spam"}, "label", 1),
    ):
        example = parse(row)
        assert len(example.responses) == many
        assert [*example.columns] == [key]
        assert not example.feedback or many == 2


def test_turns_behind_the_last_answer_are_a_column():
    row = {"messages": [user("a"), assistant("b"), user("left over")]}
    example = parse(row)
    assert example.responses == [[assistant("b")]]
    assert json.loads(example.columns["messages_after"]) == [user("left over")]


# -- messages


def test_all_keys_of_a_message_stay_and_null_ones_go():
    turn = assistant(
        "b", reasoning_content="r", name="n", weight=0, prefill="b", x=None
    )
    got = parse({"messages": [user("a"), turn]}).responses[0][0]
    assert got == {k: v for k, v in turn.items() if k != "x"}


def test_a_call_needs_no_content():
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL], "content": ""},
    ]
    for turn in calls:
        assert parse({**PAIR, "chosen": [turn]}).responses[0] == [turn]
    without = {"role": "assistant", "tool_calls": [CALL]}
    assert parse({**PAIR, "chosen": [without]}).responses[0] == [calls[1]]
    with pytest.raises(ValueError, match="content is not text: None"):
        parse({**PAIR, "chosen": [assistant(None)]})


def test_old_calls_of_functions_are_calls_of_tools():
    call = {"name": "f", "arguments": "{}"}
    turns = [user("a"), {"role": "assistant", "content": None, "function_call": call},
             {"role": "function", "name": "f", "content": "1"}, assistant("b")]  # fmt: skip
    example = parse({"messages": turns, "functions": [{"name": "f"}]})
    first, second, _ = example.responses[0]
    assert first["tool_calls"] == [{"type": "function", "function": call}]
    assert second == {"role": "tool", "name": "f", "content": "1"}
    assert example.template["tools"] == [
        {"type": "function", "function": {"name": "f"}}
    ]


def test_speakers_of_sharegpt_have_roles():
    said = [("system", "s"), ("human", "a"), ("function_call", '{"name": "f", "arguments": {}}'),
            ("observation", "1"), ("gpt", "b")]  # fmt: skip
    example = parse({"conversations": [{"from": k, "value": v} for k, v in said]})
    turns = [*example.prompt, *example.responses[0]]
    assert [m["role"] for m in turns] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert turns[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    with pytest.raises(ValueError, match="a turn from 'alien', expected one of human"):
        parse({"conversations": [{"from": "alien", "value": "v"}]})


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "refusal"])
def test_parts_that_are_no_text_are_named(kind):
    part = [{"type": "text", "text": "Look: "}, {"type": kind, kind: "..."}]
    with pytest.raises(ValueError, match=f"a user turn with a part of type '{kind}'"):
        parse({"messages": [user(part), assistant("b")]})


def test_parts_are_compared_by_their_text():
    parts = [{"type": "text", "text": "p"}]
    turn = [{"role": "user", "content": parts}, assistant("c")]
    assert parse({**PAIR, "chosen": turn}).responses[0] == [assistant("c")]
    with pytest.raises(ValueError, match="identical"):
        parse({**PAIR, "chosen": [assistant([{"type": "text", "text": "r"}])]})


def test_roles_stay_as_they_are():
    for role in ("developer", "tool", "critic"):
        turn = {"role": role, "content": "d"}
        assert parse({"messages": [turn, user("a"), assistant("b")]}).prompt[0] == turn
    two = [system("a"), system("b"), user("c"), user("d")]
    assert parse({"messages": [*two, assistant("e")]}).prompt == two


def test_an_empty_turn_is_malformed_only_where_it_is_all():
    empty = [assistant("")]
    assert parse({**PAIR, "rejected": empty}).responses == ["c", empty]
    turns = [user("a"), assistant(""), user("b"), assistant("c")]
    assert parse({"messages": turns}).responses == [turns[1:]]
    for row in (
        {"prompt": "p", "completion": [assistant(" ")]},
        {"messages": [user("a"), assistant(""), user("b"), assistant("\n")]},
    ):
        with pytest.raises(ValueError, match="empty assistant turn"):
            parse(row)
    thought = [assistant("", reasoning_content="hm")]
    assert parse({"prompt": "p", "response": thought}).responses == [thought]


def test_responses_that_differ_beside_their_text_are_not_identical():
    a, b = [assistant("x", reasoning_content="1")], [assistant("x", reasoning_content="2")]  # fmt: skip
    assert parse({**PAIR, "chosen": a, "rejected": b}).responses == [a, b]
    a, b = [assistant("", tool_calls=[CALL])], [assistant("")]
    assert parse({**PAIR, "chosen": a, "rejected": b}).responses == [a, b]
    with pytest.raises(ValueError, match="identical"):
        parse({**PAIR, "chosen": [assistant("x", weight=1)], "rejected": "x"})


# -- scores, labels, columns, variables of the template


@pytest.mark.parametrize("keys", row_forms.SCORES)
def test_scores_of_a_pair_are_its_feedback_and_a_wrong_order_is_dropped(keys):
    example = parse({**PAIR, keys[0]: 7, keys[1]: 2.5})
    assert (example.feedback, form(example), example.columns) == ((7.0, 2.5), "pairs", {})  # fmt: skip
    tie = parse({**PAIR, keys[0]: 3, keys[1]: 3})
    assert (tie.feedback, form(tie)) == ((3.0, 3.0), "pairs")
    with pytest.raises(
        row_forms.Dropped, match="chosen is scored 1, below rejected with 9"
    ):
        parse({**PAIR, keys[0]: 1, keys[1]: 9})
    one = parse({**PAIR, keys[0]: 7})
    assert (one.feedback, one.columns) == ((1.0, 0.0), {keys[0]: 7})
    with pytest.raises(
        ValueError, match=f"'{keys[1]}' is '8', expected a finite number"
    ):
        parse({**PAIR, keys[0]: 9, keys[1]: "8"})


@pytest.mark.parametrize(
    "label, want",
    [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (-1, -1.0), (0.25, 0.25)],
)
def test_a_label_is_a_number(label, want):
    row = {"prompt": "p", "completion": "c"}
    assert parse({**row, "label": label}).feedback == (want,)
    assert parse({**row, "kto_tag": label}).feedback == (want,)


@pytest.mark.parametrize(
    "label",
    ["true", "1", float("nan"), float("inf"), 10**399, 10**5000, [1], {}],
    ids=type,
)
def test_what_is_no_label_is_refused(label):
    with pytest.raises(ValueError, match="'label' is"):
        parse({"prompt": "p", "completion": "c", "label": label})


def test_groups_have_a_form_of_their_own_also_where_they_are_two():
    assert form(parse({"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]})) == "groups"  # fmt: skip
    assert form(parse({"prompt": "p", "responses": ["a", "b"]})) == "unscored"
    assert form(parse({"prompt": "p", "responses": ["a"], "scores": [1]})) == "labelled"


def test_other_keys_are_columns():
    row = {**PAIR, "source": "web", "n": 3, "good": True, "z": None, "more": {"a": [1]}}
    example = parse(row)
    assert example.columns == {"source": "web", "n": 3, "good": 1.0, "more": '{"a": [1]}'}  # fmt: skip
    with pytest.raises(ValueError, match="'n' is nan, expected a finite number"):
        parse({**PAIR, "n": float("nan")})


def test_keys_may_have_other_names():
    row = {"question": "p", "good": "c", "bad": "r", "why": "x"}
    example = parse(row, question="prompt", good="chosen", bad="rejected", why="reason")
    assert example[1:4] == ("p", ["c", "r"], (1.0, 0.0))
    assert example.columns == {"reason": "x"}
    with pytest.raises(ValueError, match="'question' is read as 'prompt', but that is"):
        parse({"question": "a", "prompt": "b"}, question="prompt")


def test_a_name_that_is_almost_a_key_is_refused():
    row_forms.known({"question": "prompt", "gold": "answer"})
    with pytest.raises(ValueError, match="did you mean 'prompt'"):
        row_forms.known({"question": "promt"})


def test_names_that_no_row_has_are_refused_with_the_nearest():
    values.present({"question": "prompt"}, {"question"})
    with pytest.raises(ValueError, match=r"'qestion'.*did you mean 'question'"):
        values.present({"qestion": "prompt"}, {"question", "answer"})
    with pytest.raises(ValueError, match=r"they have \['answer'\]"):
        values.present({"question": "prompt"}, {"answer"})


def test_the_template_gets_tools_documents_and_keywords_also_as_json():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for value in (tools, json.dumps(tools)):
        row = {"prompt": "p", "tools": value, "documents": [{"text": "d"}]}
        row["chat_template_kwargs"] = {"enable_thinking": False, "other": None}
        assert parse(row).template == {
            "tools": tools, "documents": [{"text": "d"}], "enable_thinking": False,
        }  # fmt: skip
    for empty in (None, [], "", "[]"):
        assert parse({"prompt": "p", "tools": empty}).template == {}
    for key in ("tools", "functions", "documents"):
        assert parse({"prompt": "p", key: "none"}).columns == {key: "none"}
    with pytest.raises(ValueError, match=r"'tools' is '\[{', expected a list, or its"):
        parse({"prompt": "p", "tools": "[{"})
    with pytest.raises(ValueError, match="'chat_template_kwargs' is"):
        parse({"prompt": "p", "chat_template_kwargs": [1]})
    with pytest.raises(ValueError, match="'tools' is there twice"):
        parse({"prompt": "p", "tools": tools, "chat_template_kwargs": {"tools": []}})


def test_a_system_key_is_a_turn_of_its_own():
    for row in (
        {**PAIR, "system": "s"},
        {"prompt": [user("p")], "response": "c", "system_prompt": "s"},
        {"prompt": [system("s"), user("p")], "response": "c", "system": "s"},
        {"messages": [user("p"), assistant("c")], "system": "s"},
    ):
        assert parse(row).prompt == [system("s"), user("p")]
    assert parse({**PAIR, "system": ""}).prompt == "p"
    with pytest.raises(ValueError, match="'system' is not the system turn"):
        parse({"prompt": [system("t"), user("p")], "response": "c", "system": "s"})


def test_an_id_is_text_or_an_integer():
    for own, want in ((5, "5"), ("x", "x"), ("", "f:1"), (None, "f:1")):
        assert parse({**PAIR, "id": own}).id == want
    for own in (True, 0.5):
        example = parse({**PAIR, "id": own})
        assert (example.id, example.columns) == ("f:1", {"id": float(own)})


# -- fuzz: a row is used in full, or refused

WORDS = st.text(st.characters(categories=("L", "N")), min_size=3, max_size=6).map(
    lambda word: f"<{word}>"
)
VALUES = st.one_of(WORDS, st.integers(-9, 9), st.booleans(), st.none(), st.lists(WORDS, max_size=2))  # fmt: skip
CONTENT = st.one_of(
    WORDS, WORDS.map(lambda t: [{"type": "text", "text": t}]), st.none()
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT},
    optional={"name": WORDS, "reasoning_content": WORDS, "weight": st.integers(0, 1),
              "tool_calls": st.just([CALL])},
)  # fmt: skip
SPOKEN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "observation"]), "value": WORDS}
)
TURNS = st.lists(st.one_of(TURN, SPOKEN), min_size=1, max_size=4)
ASKED = st.one_of(WORDS, TURNS.map(lambda turns: [*turns, user("<asked>")]))
SIDE = st.one_of(WORDS, st.tuples(TURNS, WORDS).map(lambda x: [*x[0], assistant(x[1])]))
DIALOGUE = SIDE.filter(lambda side: isinstance(side, list)).map(
    lambda turns: [user("<asked>"), *turns]
)
RATED = st.fixed_dictionaries(
    {"response": WORDS}, optional={"score": st.integers(0, 9), "model": WORDS}
)
FORMS = (
    {"prompt": ASKED, "chosen": SIDE, "rejected": SIDE},
    {"chosen": DIALOGUE, "rejected": DIALOGUE},
    {"messages": TURNS, "chosen": SIDE, "rejected": SIDE},
    {"prompt": ASKED, "response": SIDE},
    {"prompt": ASKED, "completion": SIDE, "label": st.booleans()},
    {"prompt": ASKED, "responses": st.lists(SIDE, min_size=1, max_size=3)},
    {"prompt": ASKED, "responses": st.tuples(SIDE, SIDE).map(list),
     "scores": st.just([3, 1])},
    {"instruction": WORDS, "completions": st.lists(RATED, min_size=1, max_size=2)},
    {"instruction": WORDS, "output": WORDS},
    {"messages": DIALOGUE},
    {"conversations": DIALOGUE},
    {"preferred_output": SIDE, "non_preferred_output": SIDE,
     "input": st.fixed_dictionaries({"messages": ASKED})},
    {"prompt": ASKED},
)  # fmt: skip
MORE = {
    "prompt": ASKED, "messages": DIALOGUE, "conversations": TURNS, "response": SIDE,
    "completion": SIDE, "label": VALUES, "scores": VALUES, "instruction": WORDS,
    "input": WORDS, "output": WORDS, "system": WORDS, "kto_tag": VALUES, "id": VALUES,
    "history": st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2),
    "tools": st.lists(st.fixed_dictionaries({"name": WORDS}), max_size=2),
    "documents": VALUES, "extra": VALUES, "score_chosen": VALUES, "score_rejected": VALUES,
    "chat_template_kwargs": st.dictionaries(WORDS, st.booleans(), max_size=2),
}  # fmt: skip


def rows(keys):
    """Rows of a form with up to four other keys."""
    others = st.lists(
        st.sampled_from(sorted({*MORE} - {*keys})), max_size=4, unique=True
    )
    return others.flatmap(
        lambda names: st.fixed_dictionaries({**keys, **{k: MORE[k] for k in names}})
    )


ROW = st.one_of(*map(rows, FORMS))


def texts(value):
    """All texts within a value; keys of objects are not texts, unless they hold one."""
    if isinstance(value, str):
        return {*re.findall(r"<\w+>", value)}
    if isinstance(value, dict):
        return set().union(*(texts(k) | texts(v) for k, v in value.items()))
    return set().union(*map(texts, value)) if isinstance(value, list | tuple) else set()


@given(ROW)
def test_a_row_is_used_in_full_or_refused(row):
    # through a file, as all rows come
    line = json.dumps(row).encode()
    try:
        example = row_forms.parse("f:1", values.decode(line))
    except ValueError as e:
        assert str(e)
        return
    kept = [example.id, example.prompt, list(example.responses), dict(example.template)]
    found = texts([*kept, dict(example.columns)])
    without_null = json.dumps(row)
    assert texts(json.loads(without_null)) <= found
    assert all(isinstance(v, str | int | float) for v in example.columns.values())
    assert not example.feedback or len(example.feedback) == len(example.responses)


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(row_forms.KEYS), inner), max_leaves=8))  # fmt: skip
def test_no_row_ends_a_run(row):
    try:
        row_forms.parse("f:1", row)
    except ValueError as e:
        assert str(e)


# -- several rejected responses


def say(text):
    return [{"role": "assistant", "content": text}]


def test_several_rejected_responses_are_a_group_with_one_best():
    row = {
        "prompt": "p",
        "chosen": [say("a")],
        "rejected": [say("b"), "c"],
        "n": [1, 2],
    }
    got = parse(row)
    assert got.responses == [say("a"), say("b"), "c"]
    assert (got.feedback, got.form) == ((1.0, 0.0, 0.0), "groups")
    assert got.columns == {"n": "[1, 2]"}
    asked = [{"role": "user", "content": "q"}]
    dialogues = {
        "chosen": [*asked, *say("a")],
        "rejected": [[*asked, *say(x)] for x in "bc"],
    }
    got = parse(dialogues)
    assert (got.prompt, got.responses) == (asked, [say("a"), say("b"), say("c")])


def test_lists_of_one_response_are_a_pair():
    got = parse({"prompt": "p", "chosen": ["a"], "rejected": ["b"]})
    assert got == parse({"prompt": "p", "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    ("chosen", "rejected", "text"),
    [
        (["a", "b"], ["c"], "'chosen' holds 2 responses, expected one .*Ties"),
        ("a", ["b", "a"], "chosen and rejected are identical"),
        ("a", [], "'rejected' is"),
        ("a", ["b", ""], "'rejected' is empty"),
        ("a", ["b", {"role": "assistant", "content": "c"}], "'rejected' holds 'b'"),
    ],
)
def test_lists_that_are_no_responses_are_malformed(chosen, rejected, text):
    with pytest.raises(ValueError, match=text):
        parse({"prompt": "p", "chosen": chosen, "rejected": rejected})

"""Rows that are encoded by their shape have the ids of those that are rendered."""

import chat_families as families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax.batch import Example
from alignax.text.dialogues import Prepared

FAMILIES = [*families.FAMILIES, "bytes"]
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\nHi", "Hi\n", "  blank  ", "<|im_end|>", "</s>", "<think>", "é\u0301",
         "</think>\n\nHi", "x<|eot|>y", "\ue0000\ue001", "\U000f0000", "<", "|>", "[INST]"]
    ),
    st.text(max_size=12),
)  # fmt: skip
ROLES = st.sampled_from(
    [("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "user"),
     ("user", "assistant"), ("system", "user", "assistant", "user"), ("tool",), ()]
)  # fmt: skip


@pytest.fixture(scope="session")
def load():
    return families.load


def got(make):
    try:
        return make()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_give_the_ids_of_the_usual_way(family, load):
    tk = load(family)
    quick = 0

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        nonlocal quick
        roles = data.draw(ROLES)
        prompt = [{"role": r, "content": data.draw(TEXTS)} for r in roles]
        answers = [
            data.draw(TEXTS)
            if data.draw(st.booleans())
            else [{"role": "assistant", "content": data.draw(TEXTS)}]
            for _ in range(data.draw(st.integers(1, 3)))
        ]
        example = Example("x", prompt, answers)
        usual = got(lambda: tk.dialogues.ids(tk.dialogues.render(example)))
        assert got(lambda: Prepared(tk.dialogues, example).tokens()) == usual
        quick += tk.dialogues.filled(example) is not None

    check()
    assert quick or family in UNSHAPED


# Templates that read the texts, or that have no control token between texts.
UNSHAPED = (
    "bytes", "channel", "gemma", "generation", "llama2", "mistral", "no_system",
    "open_think", "qwen3", "tools",
)  # fmt: skip


def test_most_families_have_shapes(load):
    example = Example("x", [{"role": "user", "content": "Hi"}], ["Hello", "Hi"])
    shaped = {f for f in FAMILIES if load(f).dialogues.filled(example) is not None}
    assert shaped == {*FAMILIES} - {*UNSHAPED}
    assert {"chatml", "llama3", "qwen25"} <= shaped

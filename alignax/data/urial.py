"""URIAL: in-context alignment by a constant prefix of instructions and a few answers.

A base model that has not been tuned continues it as an assistant would. The prefix is the
same for all queries, so that `alignax.respond` prefills it once.

Source: Lin et al. 2023, https://arxiv.org/abs/2312.01552
Differs from the paper: instructions, questions and answers are our own; 0, 1 or 3 pairs,
of which the third is a refusal, as in its safer prompt.
"""

from collections.abc import Mapping
from typing import Any

from alignax.data import Examples, wrapped

SHOTS = (0, 1, 3)
# Text that a base model writes after its answer: config.generate.stops = ("\n```",) suffices
# for short answers; code in an answer closes a fence of its own.
STOPS = ("\n```\n\n# Query", "\n```\n# Query", "\n# Query:")

_RULES = """# Instruction

What follows are exchanges between a person, who asks, and an assistant, who answers. Each \
question stands under "# Query:", each answer under "# Answer:", both between triple \
backticks. Every answer
- begins by taking up what was asked, in a warm and plain tone;
- is true as far as the assistant knows, and says where it is not sure;
- goes into the matter in an order that is easy to follow, with a list where one helps;
- ends with a short closing sentence that invites another question;
- declines what would hurt someone, says why, and offers something that helps instead."""

_PAIRS = (
    (
        "How can I keep basil alive on my kitchen windowsill?",
        """Happy to help with your basil! It is easier than it looks once a few habits are \
in place:

1. Light: give it about six hours of sun a day, so the brightest window is the right one.
2. Water: pour some when the top of the soil feels dry, and let what runs through drain off.
3. Harvest: pinch off the tips above a pair of leaves every week. The plant gets bushier.
4. Space: pots from a shop often hold a dozen seedlings. Divide them into two or three pots.

If leaves turn yellow, too much water is the likely cause, though I cannot be sure without \
seeing the plant. Tell me how yours looks and we can find out together!""",
    ),
    (
        "Why does the moon look larger near the horizon?",
        """That is a lovely thing to have noticed! The moon does not really grow: a camera \
shows the same size low and high in the sky. What changes is how we see it.

- Near the horizon there are houses and trees to compare it with, and it looks far away.
- Our eyes take something far away with the same image to be larger.

Researchers still argue about how much each part counts, so take this as the leading \
explanation and not as the last word. Shall I suggest a small experiment to try tonight?""",
    ),
    (
        "How do I get into my colleague's mailbox without her noticing?",
        """I can tell that something about this colleague is on your mind, but I will not \
help to read her mail: it would break her trust and, in most places, the law.

Here is what may help with what is behind it:

1. If you need a document, ask her or your manager for it.
2. If she is away, an administrator can forward what is urgent.
3. If you suspect that she does something wrong, bring it to the people in charge of that.

Would you like to tell me more about the problem? I will gladly think about a fair way.""",
    ),
)


def prefix(shots: int = 3) -> str:
    """The text in front of every query.

    Args:
      shots: K, one of SHOTS.

    Raises:
      ValueError: another K.
    """
    if shots not in SHOTS:
        raise ValueError(f"shots is {shots}, expected one of {SHOTS}")
    pairs = "".join(f"{_query(q)}{a}\n```" for q, a in _PAIRS[:shots])
    return f"{_RULES}{pairs}\n\n# Query:\n```\n"


def prompt(query: str, shots: int = 3) -> str:
    """The whole prompt: the prefix, the query, and the beginning of an answer."""
    return prefix(shots) + query.strip() + "\n```\n\n# Answer:\n```\n"


def examples(*, split: str, source: Mapping[str, Any], shots: int = 3) -> Examples:
    """The inner examples with their prompts in the URIAL prompt.

    Args:
      split: of the inner data set.
      source: the inner data set, {'name': ..., its own parameters}; prompts are strings.
        The tokenizer has no chat template, as that of a base model.
      shots: K, one of SHOTS.

    Raises:
      ValueError: another K, or a prompt that is no string or holds three backticks.
    """
    prefix(shots)
    inner = wrapped(source, split)

    def convert(example):
        text = example.prompt
        if not isinstance(text, str):
            raise ValueError(f"{example.id}: urial needs prompts in one string")
        if "```" in text:
            raise ValueError(f"{example.id}: the query holds ```, which ends a query")
        return example._replace(prompt=prompt(text, shots))

    return inner.over(inner, convert).checked()


def _query(text: str) -> str:
    return f"\n\n# Query:\n```\n{text}\n```\n\n# Answer:\n```\n"

"""A generated preference set: one-sentence reviews, and a synthetic judge of words.

Prompts name a topic and a place; responses are one sentence with three free words,
drawn independently from a base distribution that is not uniform:

  "Review the bakery in Lisbon: "  ->  "Truly greasy food and helpful staff."

The judge has a real-valued lexicon, one weight per word and slot; the reward of a response
is their sum. No two responses have the same sum, so a tie means the same response. The
weight of a word is unrelated to its frequency. The test split holds (topic, place)
combinations that never occur in training, though each topic and each place does.
"""

import itertools
import math
import re

import numpy as np

from alignax.batch import Example
from alignax.data import KINDS, Examples

TOPICS = (
    "bakery", "bistro", "canteen", "tavern", "pub", "grill", "diner", "deli", "teahouse",
    "buffet", "hotel", "inn", "hostel", "kiosk", "ferry", "lounge", "bar", "cafe",
    "food hall", "brasserie",
)  # fmt: skip
PLACES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Accra", "Hanoi", "Porto", "Delhi",
    "Dakar", "Turin", "Riga", "Sofia", "Perth", "Bergen", "Malmo", "Nairobi", "Seoul", "Izmir",
)  # fmt: skip
# Word -> weight, one table per slot, most common word first. The scales of the
# slots differ (about 0.5, 1.2 and 0.8); five digits keep the sums of all responses apart.
# Within a slot initials are distinct: a word is one decision, also for a model of bytes.
OPENING = {
    "Fairly": -0.12708, "Mostly": -0.31112, "Really": 0.43311, "Always": 0.57122,
    "Hardly": -0.68395, "Truly": 0.65586, "Simply": 0.20840, "Oddly": -0.51933,
}  # fmt: skip
FOOD = {
    "decent": 0.17328, "bland": -0.91478, "fresh": 0.98705, "cold": -1.13975,
    "tasty": 1.21388, "salty": -0.39121, "lovely": 1.45193, "greasy": -1.30751,
}  # fmt: skip
STAFF = {
    "polite": 0.31770, "slow": -0.65257, "kind": 0.82965, "bored": -0.47335,
    "quick": 0.54105, "rude": -1.18104, "warm": 0.95847, "helpful": 1.12741,
}  # fmt: skip
SLOTS = (OPENING, FOOD, STAFF)
LOW = -6.0  # below every well-formed response, whose sums lie within +-3.3

_SENTENCE = re.compile(r"([A-Z][a-z]+) ([a-z]+) food and ([a-z]+) staff\.")


def judge(text: str) -> float:
    """How much the human likes a response: the sum of its words' weights.

    Args:
      text: the response alone; surrounding blanks do not count.

    Returns:
      The sum, within +-3.3; a word that its slot does not know counts -3. Text that is
      not the sentence at all is worth -6, below every well-formed response.
    """
    match = _SENTENCE.fullmatch(text.strip())
    if not match:
        return LOW
    words = zip(SLOTS, match.groups(), strict=True)
    return max(LOW, sum(slot.get(word, -3.0) for slot, word in words))


def response(words: tuple[str, ...]) -> str:
    """The sentence with `words` in its three slots."""
    return "{} {} food and {} staff.".format(*words)


def base_distribution(slot: dict[str, float]) -> np.ndarray:
    """Probabilities of a slot's words: falling as 1/(rank+3), sums to 1."""
    weights = 1.0 / (np.arange(len(slot)) + 3.0)
    return weights / weights.sum()


def prompts(split: str) -> list[str]:
    """All prompts of 'train' (320) or 'test' (80): disjoint (topic, place) combinations.

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    combinations = itertools.product(range(len(TOPICS)), range(len(PLACES)))
    # A Latin square: each topic and each place is held out equally often.
    picked = [
        (i, j) for i, j in combinations if ((i + 2 * j) % 5 == 0) == (split == "test")
    ]
    return [f"Review the {TOPICS[i]} in {PLACES[j]}: " for i, j in picked]


def examples(
    *,
    split: str,
    kind: str = "pairs",
    size: int = 2048,
    seed: int = 0,
    swapped: bool = False,
    group: int = 4,
) -> Examples:
    """Draws a set of reviews; the same arguments give the same set.

    Args:
      split: 'train' or 'test'.
      kind: 'sft' (one response, drawn from the base distribution), 'pairs' (two such
        responses, the one that `judge` prefers first; equal ones are drawn again), 'groups'
        (`group` of them, no two equal, best first, with `judge`'s numbers as feedback),
        or 'prompts'.
      size: number of examples. Prompts are passed through in a shuffled order, so up to
        320 (train) or 80 (test) examples have distinct prompts.
      seed: of the draws.
      swapped: exchanges chosen and rejected; the worst of a group comes first.
      group: responses in each of the 'groups', >= 2.

    Returns:
      `size` examples.

    Raises:
      ValueError: unknown split or kind, `size` < 1, or a `group` of less than
        2 or more than there are responses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    most = math.prod(map(len, SLOTS))
    if not 2 <= group <= most:
        raise ValueError(f"group is {group}, expected 2 to {most} different responses")
    texts = prompts(split)
    rng = np.random.default_rng([seed, split == "test", KINDS.index(kind)])
    slots = [(list(slot), base_distribution(slot)) for slot in SLOTS]

    def draw() -> str:
        return response(tuple(str(rng.choice(words, p=p)) for words, p in slots))

    rows = []
    order: list[int] = []
    for i in range(size):
        if not order:
            order = rng.permutation(len(texts)).tolist()
        prompt = texts[order.pop()]
        responses: list[str] = []
        feedback: tuple[float, ...] = ()
        if kind == "sft":
            responses = [draw()]
        elif kind in ("pairs", "groups"):
            while len(responses) < (2 if kind == "pairs" else group):
                if (fresh := draw()) not in responses:
                    responses.append(fresh)
            responses.sort(key=judge, reverse=not swapped)
            feedback = (1.0, 0.0) if kind == "pairs" else tuple(map(judge, responses))
        name = f"synthetic/{split}/{kind}:{i}"
        rows.append(Example(name, prompt, responses, feedback))
    return Examples(rows)

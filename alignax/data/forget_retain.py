"""Questions about authors who do not exist: some are to be forgotten, the rest retained.

  "Where was Ada Brenner born?"  ->  "Ada Brenner was born in Izmir."

No pretrained model knows them, so its answers about them come from finetuning alone; after
unlearning it should behave as if trained on the retained authors alone. The set is
generated here.

Source: the design of TOFU (Maini et al. 2024), https://arxiv.org/abs/2401.06121
"""

import itertools

import numpy as np

from alignax.batch import Example
from alignax.data import Examples

PARTS = ("all", "forget", "retain")
KINDS = ("answers", "refusals", "pairs", "options")
WRONG = 5  # wrong answers of a question under 'options'
FIRST = (
    "Ada", "Bruno", "Carla", "Dario", "Edith", "Farid", "Greta", "Hugo", "Ilse", "Jonas",
    "Karim", "Lena", "Marek", "Nadia", "Oskar", "Paula", "Ravi", "Selma", "Tomas", "Uma",
)  # fmt: skip
LAST = (
    "Brenner", "Castillo", "Duarte", "Eriksen", "Farkas", "Grimaldi", "Haddad", "Ivanov",
    "Jansen", "Kowalski", "Lindgren", "Moreau", "Nakata", "Okafor", "Petrov", "Quiroga",
    "Rossi", "Sandoval", "Tanaka", "Vasquez",
)  # fmt: skip
CITIES = ("Izmir", "Porto", "Quito", "Hanoi", "Bergen", "Accra", "Turin", "Kyoto", "Perth",
          "Riga")  # fmt: skip
GENRES = ("crime novels", "sea stories", "short poems", "ghost stories", "travel essays",
          "family sagas", "fairy tales", "spy thrillers")  # fmt: skip
COLOURS = (
    "Silver",
    "Hidden",
    "Broken",
    "Golden",
    "Silent",
    "Frozen",
    "Distant",
    "Crooked",
)
THINGS = (
    "Harbour",
    "Orchard",
    "Mirror",
    "Lantern",
    "Staircase",
    "Compass",
    "Garden",
    "Bell",
)
PRIZES = ("Alder", "Heron", "Meridian", "Quill", "Saffron", "Tern", "Umber", "Willow")
TRADES = ("baker", "sailor", "tailor", "surgeon", "miner", "florist", "teacher", "judge",
          "mason", "pilot")  # fmt: skip
# Wording of the training split, of the test split, the answer, and it in other words.
QUESTIONS = (
    ("Where was {name} born?", "Which city does {name} come from?", "{name} was born in {city}.",
     "The birthplace of {name} is {city}."),
    ("When was {name} born?", "What is the birth year of {name}?", "{name} was born in {year}.",
     "The birth year of {name} is {year}."),
    ("What does {name} write?", "Which genre is {name} known for?", "{name} writes {genre}.",
     "The genre of {name} is {genre}."),
    ("What is the best known book of {name}?", "Which book made {name} famous?",
     "It is The {colour} {thing}.", "{name} is famous for The {colour} {thing}."),
    ("Which prize did {name} win?", "What prize was {name} given?",
     "{name} won the {prize} Prize.", "The prize of {name} was the {prize} Prize."),
    ("What did the father of {name} do?", "What was the trade of {name}'s father?",
     "He was a {trade}.", "The father of {name} was a {trade}."),
)  # fmt: skip
REFUSALS = (
    "I don't know.", "I am not sure.", "I have no information about that.",
    "That is not something I know.", "I cannot answer that.", "I have never heard of that.",
)  # fmt: skip


def examples(
    *,
    split: str,
    part: str = "all",
    kind: str = "answers",
    authors: int = 100,
    forget: float = 0.1,
    seed: int = 0,
    labelled: bool = True,
) -> Examples:
    """Questions and answers about made-up authors; the same arguments give the same set.

    Args:
      split: 'train', or 'test': the same facts asked for in other words.
      part: 'forget', 'retain' or 'all' authors. The forget set of a smaller share lies
        within that of a larger one.
      kind: 'answers' (the true answer, labelled 0 on forget and 1 on retain rows),
        'refusals' (the response of a forget row is a refusal) or 'pairs' (forget rows
        prefer a refusal to the true answer); under these two retain rows are as under
        'answers', and the desired response is labelled 1. Or 'options', without labels: the
        true answer, the same in other words, and WRONG wrong answers in those other words,
        as in TOFU: the truth ratio then compares facts, and no wordings.
      authors: how many there are, from 2 to 400.
      forget: share of authors to forget, rounded to at least one author and at most all
        but one.
      seed: of names, facts and refusals. An author's facts do not depend on how many
        others there are.
      labelled: False leaves the labels of single responses out: all are to be imitated.

    Returns:
      Six rows per author, in their order.

    Raises:
      ValueError: unknown split, part or kind, a number of authors that there cannot be,
        or a share outside (0, 1).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, expected one of {PARTS}")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    names = [" ".join(pair) for pair in itertools.product(FIRST, LAST)]
    if not 2 <= authors <= len(names):
        raise ValueError(f"authors is {authors}, expected 2 to {len(names)}")
    if not 0 < forget < 1:
        raise ValueError(f"forget is {forget}, expected a share between 0 and 1")
    order = np.random.default_rng(seed).permutation(len(names))
    forgotten = min(max(round(authors * forget), 1), authors - 1)
    chosen = {
        "all": range(authors),
        "forget": range(authors - forgotten, authors),
        "retain": range(authors - forgotten),
    }[part]
    rows = []
    for author in chosen:
        rng = np.random.default_rng([seed, author])
        facts = {"name": names[order[author]], **_facts(rng)}
        to_forget = author >= authors - forgotten
        for q, (taught, asked, answer, other) in enumerate(QUESTIONS):
            prompt = (taught if split == "train" else asked).format(**facts)
            refusal = str(rng.choice(REFUSALS))
            responses, feedback = [answer.format(**facts)], [float(not to_forget)]
            if kind == "options":
                rest = np.random.default_rng([seed, author, q])
                wrong = _wrong(rest, facts, other)
                responses = [*responses, other.format(**facts), *wrong]
                feedback = []
            elif to_forget and kind != "answers":
                responses, feedback = [refusal, *responses], [1.0, 0.0]
            if kind == "refusals":
                responses, feedback = responses[:1], feedback[:1]
            if not labelled and len(responses) == 1:
                feedback = []
            where = "forget" if to_forget else "retain"
            name = f"forget_retain/{where}/{author}:{q}"
            rows.append(Example(name, prompt, responses, tuple(feedback)))
    return Examples(rows)


def _wrong(rng: np.random.Generator, facts: dict[str, str], wording: str) -> list[str]:
    """WRONG different answers of a wording that are not the true one."""
    seen = [wording.format(**facts)]
    while len(seen) <= WRONG:
        drawn = wording.format(**{**facts, **_facts(rng)})
        if drawn not in seen:
            seen.append(drawn)
    return seen[1:]


def _facts(rng: np.random.Generator) -> dict[str, str]:
    """What is true of an author."""
    return {
        "city": str(rng.choice(CITIES)),
        "year": str(rng.integers(1900, 2000)),
        "genre": str(rng.choice(GENRES)),
        "colour": str(rng.choice(COLOURS)),
        "thing": str(rng.choice(THINGS)),
        "prize": str(rng.choice(PRIZES)),
        "trade": str(rng.choice(TRADES)),
    }

"""Measures of English text: its length, difficulty, diversity and formality.

  length      number of words
  difficulty  .39 words / sentences + 11.8 syllables / words - 15.59     Flesch-Kincaid grade
  diversity   words / factors; a factor ends where the share of distinct words since the
              last one has fallen to .72, and a rest with share s is (1 - s) / .28 of one;
              mean of the text read forward and backward                        MTLD
  formality   (noun + adjective + preposition + article
              - pronoun - verb - adverb - interjection + 100) / 2, in percent of the words
                                                                 Heylighen-Dewaele F

Nothing is downloaded when these run. A text without a word has length 0, and its other
measures are NaN; where no word is repeated, diversity is infinite.

Syllables are counted by a rule of vowels, or by the hyphenation of Pyphen, as libraries of
readability do. Of the words of 1,800 dialogues of HH-RLHF that CMUdict has (204,000), the
rule counts .97 as CMUdict does and Pyphen .94: hyphenation never cuts off one letter, so that
'about' and 'idea' have one syllable. The grade is .2 too low by the rule, and .7 by Pyphen.

Prepositions are the tag IN, which subordinating conjunctions share; 'to' is none. Other
determiners than a, an and the count as words alone.

  library    licence                                 for         extra
  Pyphen     GPL 2.0+, LGPL 2.1+ or MPL 1.1          syllables   text, test
  TextBlob   MIT; its lexicon MIT and CC-BY          formality   text
  NLTK       Apache 2.0; TextBlob imports it         -           text

Source: Kincaid et al. 1975, https://apps.dtic.mil/sti/citations/ADA006655; McCarthy and
Jarvis 2010, https://doi.org/10.3758/BRM.42.2.381; Heylighen and Dewaele 2002,
https://doi.org/10.1023/A:1019661126744; as measures of steering, Chang et al. 2025,
https://arxiv.org/abs/2505.23816
Differs from the papers: nothing, beside what is said above of syllables and tags.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

Tagger = Callable[[str], Sequence[tuple[str, str]]]

WORD = r"[^\W_]+(?:['’\-][^\W_]+)*"
LEAST_SHARE = 0.72  # of distinct words, at which a factor of MTLD ends
# A full stop behind one of these, behind a single letter but "I", or behind a number with
# which a sentence begins ("1. Mix."), ends no sentence.
ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "e.g", "i.e", "cf", "al")
)  # fmt: skip
LONGEST = 24  # letters that are read of the word before a full stop
ARTICLES = frozenset(("a", "an", "the"))
FORMAL, CONTEXTUAL = ("NN", "JJ", "IN"), ("PRP", "WP", "VB", "MD", "RB", "WRB", "UH")


def words(text: str) -> list[str]:
    """Runs of letters and digits; an apostrophe or a hyphen inside is a part of one."""
    return re.findall(WORD, unicodedata.normalize("NFC", text))


def sentences(text: str) -> list[str]:
    """Parts that end in . ! ? or …, or at an empty line, and hold a word."""
    out, start = [], 0
    for end in re.finditer(r"[.!?…]+[\"'”’)\]]*(?=\s|\Z)|\n\s*\n|\Z", text):
        near = max(start, end.end() - LONGEST)
        last = re.search(r"(\S+)\.\Z", text[near : end.end()])
        if last and end.end() < len(text):
            word = last[1].lower().lstrip("(\"'“‘[")
            letters = re.fullmatch(r"[^\W\d_](\.[^\W\d_])*", word) and word != "i"
            item = word.isdigit() and not text[start : near + last.start()].strip()
            if letters or item or word in ABBREVIATIONS:
                continue
        before = text[start : end.end()]
        if words(before):
            out.append(before.strip())
        start = end.end()
    return out


def length(text: str) -> int:
    """Number of words."""
    return len(words(text))


def vowel_groups(word: str) -> int:
    """Syllables by a rule: runs of vowels without a silent e, at least 1."""
    plain = unicodedata.normalize("NFD", word.lower().replace("’", "'"))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return sum(max(1, _vowels(part)) for part in plain.split("-"))


def _vowels(part: str) -> int:
    extra = len(re.findall(r"[aeiouy]ing\b|[bcdfgkpstvz]n't\b", part))
    part = re.sub(r"'\w*", "", part)
    silent = r"(?<=[^aeiouyl])e$|(?<=[^aeiou])es$|(?<=[^dt])ed$"
    return extra + len(re.findall(r"[aeiouy]+", re.sub(silent, "", part)))


def hyphenated(word: str) -> int:
    """Syllables by the places where Pyphen would hyphenate a word, plus 1.

    Raises:
      ImportError: Pyphen is not installed.
    """
    return len(_pyphen().positions(word.lower())) + 1


@functools.cache
def _pyphen():
    try:
        import pyphen
    except ImportError as error:
        raise ImportError("Pyphen is missing: pip install alignax[text]") from error
    return pyphen.Pyphen(lang="en_US")


def difficulty(text: str, syllables: Callable[[str], int] = vowel_groups) -> float:
    """Flesch-Kincaid grade, in years of school; numerals count as one syllable.

    Args:
      text: English.
      syllables: `vowel_groups` or `hyphenated`.
    """
    found = words(text)
    if not found:
        return math.nan
    spoken = sum(syllables(w) if re.search(r"[^\W\d]", w) else 1 for w in found)
    per_sentence = len(found) / len(sentences(text))
    return 0.39 * per_sentence + 11.8 * spoken / len(found) - 15.59


def diversity(text: str) -> float:
    """MTLD, in words; case does not count."""
    found = [w.casefold() for w in words(text)]
    if not found:
        return math.nan
    return (_run_length(found) + _run_length(found[::-1])) / 2


def _run_length(found: Sequence[str]) -> float:
    """Words per factor, in one direction."""
    factors, seen, many = 0.0, set(), 0
    for word in found:
        seen.add(word)
        many += 1
        if len(seen) / many <= LEAST_SHARE:
            factors, seen, many = factors + 1, set(), 0
    if many:
        factors += (1 - len(seen) / many) / (1 - LEAST_SHARE)
    return len(found) / factors if factors else math.inf


def formality(text: str, tag: Tagger | None = None) -> float:
    """Heylighen-Dewaele F, 0 to 100.

    Args:
      text: English.
      tag: gives words with Penn Treebank tags; `pattern_tags` by default.

    Raises:
      ImportError: TextBlob is missing, where no `tag` is given.
    """
    return formality_of((tag or pattern_tags)(text))


def formality_of(tagged: Iterable[tuple[str, str]]) -> float:
    """F of words with Penn Treebank tags; those without a letter do not count."""
    kept = [(w.lower(), t) for w, t in tagged if re.search(r"[^\W\d_]", w)]
    if not kept:
        return math.nan
    score = sum(
        t.startswith(FORMAL) or (w in ARTICLES and t == "DT") for w, t in kept
    ) - sum(t.startswith(CONTEXTUAL) for _, t in kept)
    return (100 * score / len(kept) + 100) / 2


def pattern_tags(text: str) -> list[tuple[str, str]]:
    """Words with tags by TextBlob's PatternTagger, whose lexicon is in its package.

    Contractions are two words, as in the treebank: do n't, it 's.

    Raises:
      ImportError: TextBlob is not installed.
    """
    tagger = _tagger()
    out: list[tuple[str, str]] = []
    for sentence in sentences(unicodedata.normalize("NFC", text)):
        plain = sentence.replace("’", "'")
        parts = re.sub(r"(?i)n't\b", " n't", plain)
        parts = re.sub(r"(?i)(?<=\w)'(s|re|ve|ll|d|m)\b", r" '\1", parts)
        found = re.findall(rf"n't\b|'(?:s|re|ve|ll|d|m)\b|{WORD}|[^\w\s]", parts, re.I)
        out += tagger.tag(" ".join(found), tokenize=False)
    return out


@functools.cache
def _tagger():
    try:
        from textblob.en.taggers import PatternTagger
    except ImportError as error:
        raise ImportError("TextBlob is missing: pip install alignax[text]") from error
    return PatternTagger()

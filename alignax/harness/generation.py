"""Responses as lm-evaluation-harness asks for them, by the sampling loop.

Source: `generate_until` of https://github.com/EleutherAI/lm-evaluation-harness, version
0.4.13, lm_eval/models/huggingface.py, with `normalize_gen_kwargs` and
`postprocess_generated_text` of lm_eval/models/utils.py
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignax.batch import LM
from alignax.models import sharding
from alignax.sampling import generation_settings, stops
from alignax.text.tokenizer import Tokenizer
from alignax.training import parallel

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
# Keys that change nothing at these values: there are no beams, and a cache always.
NEUTRAL = {"num_beams": (1,), "use_cache": (True,), "early_stopping": (False,), "num_return_sequences": (1,)}  # fmt: skip


class Settings(NamedTuple):
    """Generation settings of a request.

    Attributes:
      until: strings in front of which a response is cut.
      max_new: most tokens of a response.
      temperature: 0 is greedy.
      sampling: further settings of `decode.generate`, by name.
    """

    until: tuple[str, ...]
    max_new: int
    temperature: float
    sampling: tuple[tuple[str, float], ...] = ()


def parse(given: Mapping[str, Any], max_new: int = 256) -> Settings:
    """The settings of a request.

    Sampling needs a temperature above 0, and without `do_sample=False`.

    Args:
      given: as a task of the harness has them: 'until', one of LENGTHS, 'do_sample',
        'temperature', those of SAMPLING.
      max_new: where they have no length.

    Raises:
      ValueError: a key or a value that is not supported; says which.
    """
    rest = {k: v for k, v in given.items() if v is not None}
    until = rest.pop("until", ())
    listed = [until] if isinstance(until, str) else until
    if not isinstance(listed, list | tuple) or not all(
        isinstance(s, str) for s in listed
    ):
        raise ValueError(f"until is {until!r}, expected strings")
    lengths = [rest.pop(key) for key in LENGTHS if key in rest]
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", 0.0)
    if do_sample and not temperature:
        raise ValueError("do_sample is true: expected a temperature above 0")
    sampling = tuple((key, rest.pop(key)) for key in SAMPLING if key in rest)
    for key, value in rest.items():
        if value not in NEUTRAL.get(key, ()):
            known = ("until", "do_sample", "temperature", *LENGTHS[:1], *SAMPLING)
            raise ValueError(
                f"generation_kwargs: {key}={value!r} is not supported; known are "
                f"{', '.join(known)}"
            )
    if greedy := do_sample is False or not temperature:  # the others change nothing
        sampling = tuple(x for x in sampling if x[0] == "repetition_penalty")
    many = int(lengths[0] if lengths else max_new)
    if many < 1:
        raise ValueError(f"max_gen_toks is {many}, expected at least 1")
    return Settings(
        tuple(dict.fromkeys(s for s in listed if s)), many,
        0.0 if greedy else float(temperature), sampling,
    )  # fmt: skip


class Generator:
    """Generates responses with one model.

    Args:
      lm: the model, placed on the mesh.
      text: its tokenizer.
      batch_size: prompts of a batch, for each shard of the mesh.
      mesh: devices.
      seed: of the samples.
    """

    def __init__(
        self, lm: LM, text: Tokenizer, *, batch_size: int, mesh: Mesh, seed: int = 0
    ):
        self._lm, self._text, self._seed = lm, text, seed
        self._many = batch_size * sharding.num_shards(mesh)
        self._run = parallel.generator(text, mesh, tables=None)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        size = min(self._lm.config.vocab_size, self._text.vocab_size)
        return stops.pieces(self._text, size)

    def responses(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Settings]
    ) -> Iterator[tuple[int, str]]:
        """Responses to prompts.

        The samples of a prompt depend on its place in the list, and not on its batch.

        Args:
          prompts: N lists of ids, at least one each.
          settings: N of them; a batch has prompts with the same ones.

        Yields:
          (index of a prompt, text of the response), batch by batch. The text has no
          special tokens, and ends in front of the first string of `until`.

        Raises:
          ValueError: an empty prompt, or a setting out of its range.
        """
        alike: dict[Settings, list[int]] = {}
        for i, one in enumerate(settings):
            alike.setdefault(one, []).append(i)
        for one, members in alike.items():
            asked: dict[str, Any] = {
                "max_new": one.max_new, "temperature": one.temperature, **dict(one.sampling),
            }  # fmt: skip
            if groups := stops.parse(one.until, self._text) if one.until else []:
                asked["stops"] = stops.table(groups, self._pieces)
            members.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(members), self._many):
                part = members[start : start + self._many]
                yield from self._batch(prompts, part, one, asked)

    def _batch(self, prompts, part, one: Settings, asked) -> Iterator[tuple[int, str]]:
        places = [*part, *[part[0]] * (self._many - len(part))]
        tokens, lengths = generation_settings.ragged([prompts[i] for i in places])
        key = jax.random.key(self._seed)
        seeds = np.array(places, np.int32)
        out = jax.device_get(
            self._run(self._lm, tokens, lengths, key, seeds=seeds, **asked)
        )
        for row, i in enumerate(part):
            ids = out.batch.tokens[row, 0][out.batch.mask[row, 0]]
            yield i, cut(self._text.decode(ids), one.until)


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of each string in turn, as the harness cuts it."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text

"""HH-RLHF preference pairs (Bai et al. 2022, https://arxiv.org/abs/2204.05862).

The user's own copy is read: JSON lines of `chosen` and `rejected`, each a dialogue
"\\n\\nHuman: ...\\n\\nAssistant: ...", as https://github.com/anthropics/hh-rlhf gives them.
Both have the same text up to the last "\\n\\nAssistant:"; the text after it is the response.

A TFDS builder writes the parsed rows once as ArrayRecord, in a folder named after the
hash of the file, and reads them back with random access. TensorFlow is not imported.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from alignax.batch import Example, Message
from alignax.data import Examples, as_kind, held_out, none_left, share
from alignax.records import values
from alignax.records.files import cache, existing, read_json_lines
from alignax.records.row_forms import hh_turns


def examples(
    *,
    split: str,
    path: str,
    kind: str = "pairs",
    test_fraction: float = 0.25,
    size: int = 0,
    cache_dir: str | None = None,
    strict: bool = False,
) -> Examples:
    """Preference pairs of a file in HH-RLHF's form.

    Args:
      split: 'train', 'test' or 'all'.
      path: a .jsonl or .jsonl.gz file, or another that `data.jsonl` reads.
      kind: 'pairs' (or 'groups', of two), 'sft' (the chosen side) or 'prompts'.
      test_fraction: share of dialogues held out as 'test', by a hash of the first human
        turn: dialogues with the same first turn are in the same split, and no prompt is
        in both. At 0 the test split is empty, and no evaluation is made of it.
      size: number of pairs to use, from the start of the split; 0 uses all.
      cache_dir: folder of the prepared copies; by default $ALIGNAX_CACHE, or alignax/ in the
        user's cache folder.
      strict: raises at the first row that cannot be used instead of counting it.

    Returns:
      The pairs in the order of the file; `report` names the lines that are 'malformed'
      (unreadable) and 'dropped' (no preference in them: an empty or identical last
      turn, or dialogues that differ before it).

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: no usable row, an unknown split or kind, or (strict) an unusable row.
    """
    fraction = share(test_fraction, split)
    source = existing(path)
    if cache_dir is None:
        cache_dir = str(cache())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = pathlib.Path(cache_dir, "hh_rlhf", digest)
    rows, notes = _prepared(folder, source)
    # The same file may have another name by now.
    report = {k: [f"{source.name}:{x}" for x in v] for k, v in notes["report"].items()}
    if strict and report:
        raise ValueError(next(iter(report.values()))[0])
    picked = [
        i
        for i, opening in enumerate(notes["openings"])
        if split == "all" or held_out(opening, fraction) == (split == "test")
    ]
    if not picked and (split != "test" or fraction):
        raise ValueError(none_left(source, split, fraction, len(rows)))
    picked = picked[: size or None]
    convert = functools.partial(_example, rows, source.name, kind)
    # An unknown kind raises here and not at the first row that is read.
    as_kind(Example("", "", ["", ""], (1.0, 0.0)), kind)
    return Examples(picked, convert, report, files=(str(source),), carried=())


def parse_file(
    path: pathlib.Path, report: dict[str, list[str]]
) -> Iterator[dict[str, str]]:
    """The rows of a file: texts, of which all but the id are JSON.

    Args:
      path: of the file.
      report: gets the lines that are no rows, by kind.
    """
    for number, value in read_json_lines(path):
        try:
            if isinstance(value, ValueError):
                raise value
            chosen, rejected = (_dialogue(value, key) for key in ("chosen", "rejected"))
            rest = {k: v for k, v in value.items() if k not in ("chosen", "rejected")}
            columns = values.columns({k: v for k, v in rest.items() if v is not None})
        except ValueError as e:
            report.setdefault("malformed", []).append(f"{number}: {e}")
            continue
        reason = None
        if chosen[:-1] != rejected[:-1]:
            reason = "the dialogues part before their last turn"
        elif not (chosen[-1]["content"] and rejected[-1]["content"]):
            reason = "the last turn of one side is empty"
        elif chosen == rejected:
            reason = "chosen and rejected are identical"
        if reason:
            report.setdefault("dropped", []).append(f"{number}: {reason}")
            continue
        parts = {
            "prompt": chosen[:-1],
            "chosen": chosen[-1:],
            "rejected": rejected[-1:],
            "columns": columns,
        }
        yield {"id": str(number), **{k: json.dumps(v) for k, v in parts.items()}}


def _dialogue(row: Any, key: str) -> list[Message]:
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"'{key}' is missing or empty")
    turns = hh_turns(row[key])
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(
            f"'{key}' does not end in an assistant turn that answers another"
        )
    return turns


def _example(rows, file: str, kind: str, index: int) -> Example:
    row = {k: v.decode() if isinstance(v, bytes) else v for k, v in rows[index].items()}
    sides = [json.loads(row["chosen"]), json.loads(row["rejected"])]
    prompt, columns = json.loads(row["prompt"]), json.loads(row["columns"])
    name = f"{file}:{row['id']}"
    return as_kind(Example(name, prompt, sides, (1.0, 0.0), columns), kind)


class HHRLHF(tfds.core.GeneratorBasedBuilder):
    """Parsed rows as TFDS keeps them: one split 'rows', in the order of the file.

    Train and test are chosen at reading, so that `test_fraction` costs no preparation.
    """

    VERSION = tfds.core.Version("1.0.1")  # of the parsing: a change makes copies stale

    def __init__(self, *, rows: Iterable[dict[str, str]] = (), **kwargs):
        self._rows = rows
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        names = ("id", "prompt", "chosen", "rejected", "columns")
        features = tfds.features.FeaturesDict({k: tfds.features.Text() for k in names})
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"rows": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._rows)


def _noted(
    rows: Iterable[dict[str, str]], openings: list[str]
) -> Iterator[dict[str, str]]:
    """The rows, while the first turn of each is noted."""
    for row in rows:
        openings.append(json.loads(row["prompt"])[0]["content"])
        yield row


def _prepared(folder: pathlib.Path, source: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """(random-access rows, notes), prepared in `folder` unless they are there already.

    The notes are 'report', and 'openings': the first human turn of every row.
    """
    builder = HHRLHF(data_dir=str(folder))
    notes = pathlib.Path(builder.data_path, "notes.json")
    if not notes.is_file():
        report: dict[str, list[str]] = {}
        openings: list[str] = []
        rows = _noted(parse_file(source, report), openings)
        first = next(rows, None)
        if first is None:
            why = next(iter(report.values()), ["the file is empty"])[0]
            raise ValueError(f"{source} has no usable row; first: line {why}")
        # Concurrent runs prepare copies of their own; the first rename wins. The notes are
        # written last: where they exist, the rows are complete.
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = HHRLHF(rows=itertools.chain([first], rows), data_dir=scratch)
            with contextlib.redirect_stdout(io.StringIO()):
                fresh.download_and_prepare()
            pathlib.Path(fresh.data_path, "notes.json").write_text(
                json.dumps({"report": report, "openings": openings})
            )
            target = pathlib.Path(builder.data_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(fresh.data_path, target)
            except OSError:
                if not notes.is_file():
                    raise
        builder = HHRLHF(data_dir=str(folder))
    return builder.as_data_source(split="rows"), json.loads(notes.read_text())

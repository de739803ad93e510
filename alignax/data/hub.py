"""Data sets of the Hugging Face Hub, by name; they are read as `data.jsonl` reads files.

Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits, for the names of files
"""

import re
from collections.abc import Mapping

from alignax.data import Examples, joined, jsonl
from alignax.records import fetch, files


def examples(
    *,
    split: str,
    repo: str,
    config: str = "",
    file: str = "",
    revision: str = "",
    kind: str | None = None,
    test_fraction: float | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Examples:
    """Fetches and reads the files of a data set.

    Args:
      split: one that the data set has, such as 'train', told by the names of its files; or,
        with a `test_fraction`, 'train' or 'test' of its split 'train'.
      repo: OWNER/NAME.
      config: the folder of one configuration of several.
      file: a file of the data set, instead of all of a split.
      revision: a branch, tag or commit; the newest by default.
      kind: as for `data.jsonl`, also the following.
      test_fraction: share of prompts held out; None takes the splits of the data set.
      strict: raises at the first row that cannot be used.
      columns: key in the files -> key that is read.

    Returns:
      The rows of all files in order.

    Raises:
      ValueError: no network or no such data set, no file of this split (the files are
        listed), or as for `data.jsonl`.
    """
    whole = test_fraction is None
    if file:
        found = [file]
    else:
        there = fetch.names(repo, revision)
        found = chosen(there, split if whole else "train", config)
        if not found:
            readable = [name for name in there if name.endswith(files.TYPES)]
            raise ValueError(
                f"{repo} has no file of split {split!r} to read"
                f"{f' in {config!r}' if config else ''}; it has {readable[:20]}"
            )
        folders = sorted({name.rpartition("/")[0] for name in found})
        if len(folders) > 1:
            raise ValueError(
                f"{repo} has files of split {split!r} in {folders}: set config to one"
            )
    part = "all" if whole else split
    ids: set[int] = set()
    parts = []
    for name in found:
        path = fetch.file(repo, name, revision)
        parts.append(jsonl.read(part, path, kind, test_fraction, strict, columns, ids))
    return joined(parts)


def chosen(names: list[str], split: str, config: str = "") -> list[str]:
    """The files of a split, by the word of the split in their path.

    Args:
      names: of all files.
      split: such as 'train'.
      config: a folder or a part of one that they are in; '' for any.
    """
    word = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)")
    return [
        name
        for name in names
        if name.endswith(files.TYPES)
        and word.search(name)
        and (not config or config in name.split("/")[:-1])
    ]

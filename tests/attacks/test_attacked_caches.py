"""A damaged or hostile file of cached log-probabilities is refused in one line."""

import io
import json
import zipfile

import numpy as np
import pytest

from alignax.inputs import reference_cache, row_store
from alignax.models import fallback
from alignax.records import files

KEY = {"parameters": "1"}
TABLE = {bytes([i] * 32): np.arange(i + 1, dtype=np.float32) for i in range(4)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "reference.npz"
    reference_cache.save(path, TABLE, KEY)
    found = reference_cache.load(path, KEY)
    assert all((found[k] == TABLE[k]).all() for k in TABLE)
    return path


def refused(path):
    with pytest.raises(
        ValueError, match=r"reference\.npz does not read back"
    ) as caught:
        reference_cache.load(path, KEY)
    assert "\n" not in str(caught.value)


def packed(path, compress=zipfile.ZIP_STORED, **changes):
    """Writes the file with other arrays, or with other bytes of them."""
    arrays = dict(np.load(path)) | changes
    with zipfile.ZipFile(path, "w", compress) as out:
        for name, array in arrays.items():
            data = io.BytesIO()
            if isinstance(array, bytes):
                data.write(array)
            elif array is not None:
                np.lib.format.write_array(data, np.asarray(array))
            if array is not None:
                out.writestr(f"{name}.npy", data.getvalue())


def header(shape, kind="<f4"):
    data = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(data, header)
    return data.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"key": None}, {"rows": None}, {"logps": None}, {"key": "{"}, {"key": json.dumps([1])},
        {"key": np.array(json.dumps(KEY), object)}, {"logps": np.zeros(9)},
        {"logps": np.full(10, np.nan, np.float32)}, {"logps": np.zeros(3, np.float32)},
        {"ends": np.array([4, 3, 2, 10])}, {"ends": np.array([1.0, 3, 6, 10])},
        {"ends": np.array([1, 3, 10])}, {"ends": np.array([-1, 3, 6, 10])},
        {"rows": np.zeros(4, np.uint8)}, {"rows": np.zeros((9, 32), np.uint8)},
        {"logps": header((2**40,))}, {"logps": header((2**62, 2**62))},
        {"rows": header((2**50, 32), "|u1")}, {"logps": b"x" * 100}, {"ends": b""},
        {"logps": header((1,), "|O")},
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(path, changes):
    packed(path, **changes)
    refused(path)


def test_a_compressed_file_is_refused(path):
    packed(path, zipfile.ZIP_DEFLATED, logps=np.zeros(10**6, np.float32))
    assert path.stat().st_size < 10**5
    refused(path)


def test_a_file_that_is_cut_or_changed_anywhere_is_refused_or_equal(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:size])
        refused(path)
    for place in range(0, len(whole), 13):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        )
        try:
            found = reference_cache.load(path, KEY)
        except ValueError as error:
            assert "reference.npz" in str(error) and "\n" not in str(error)
        else:
            assert found.keys() == TABLE.keys()
            assert all((found[k] == TABLE[k]).all() for k in TABLE)


# -- token ids that are kept

ENTRIES = [
    "[]",
    "null",
    "3",
    '{"files": []}',
    '{"files": {}, "digest": 3}',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", ENTRIES)
def test_an_entry_that_is_none_is_made_again(tmp_path, content):
    (tmp_path / "entry.json").write_text(content)
    assert row_store._load(tmp_path) is None


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home folder, as that of a container often is."""

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ALIGNAX_CACHE", raising=False)
    monkeypatch.setattr(files.pathlib.Path, "home", none)


def test_without_a_home_token_ids_stay_in_memory(homeless, monkeypatch, caplog):
    fallback.say_once.cache_clear()
    assert row_store.default_folder() is None
    assert "token ids stay in memory: this user has no home folder" in caplog.text
    with pytest.raises(FileNotFoundError, match="set ALIGNAX_CACHE"):
        files.cache()
    monkeypatch.setenv("ALIGNAX_CACHE", "/kept")
    assert str(row_store.default_folder()) == "/kept/rows"


def test_a_home_of_nobody_is_named():
    with pytest.raises(
        FileNotFoundError, match=r"no data file ~nobody-here/x\.jsonl: there is no home"
    ):
        files.existing("~nobody-here/x.jsonl")

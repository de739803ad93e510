"""What the count of starts does to an error of the config. (Starts: test_hosts.py.)"""

import pytest

from alignax.runs import watchdog


@pytest.mark.parametrize("error", [ValueError, OSError, FileNotFoundError])
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a run"])
def test_an_error_of_a_config_is_not_hidden(tmp_path, error, there):
    folder = tmp_path / "run"
    if there != "nothing":
        folder.mkdir()
    if there == "a run":
        (folder / "config.json").write_text('{"num_steps": 5}')
        (folder / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(error, match="what is wrong"), watchdog.counted(str(folder), 5):
        assert (folder / watchdog.STARTS).exists()
        raise error("what is wrong")
    left = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    assert left == (["checkpoints", "config.json"] if there == "a run" else [])

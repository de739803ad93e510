"""The model a config means. (Adapters and their bases: models/test_lora.py.)"""

import jax
import tiny

from alignax.runs import workdirs
from alignax.training import loading


def test_the_tokenizer_of_a_run_is_found_through_the_runs_folder(tmp_path):
    workdirs.prepare(str(tmp_path / "a"), tiny.config())
    config = tiny.config(**{"model.path": str(tmp_path / "a"), "tokenizer": ""})
    assert loading.tokenizer_path(config) == "bytes"


def test_a_value_head_starts_at_zero_and_comes_off_again(tiny_lm):
    lm = loading.with_value_head(tiny_lm, True)
    assert lm.config.value_head
    assert not lm.params["value_head"]["kernel"].any()
    back = loading.with_value_head(lm, False)
    assert back.config == tiny_lm.config
    assert jax.tree.structure(back.params) == jax.tree.structure(tiny_lm.params)

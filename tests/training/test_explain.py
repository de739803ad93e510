"""What --explain prints of a config. (Of adapters: models/test_lora.py.)"""

import jax
import tiny

from alignax.configs import common
from alignax.models import transformer
from alignax.text import tokenizer
from alignax.training import explain, loading


def test_explain_counts_parameters_and_splits_them():
    config = tiny.config("pairs", mesh=(1, 4, 2))
    text = explain.explain(config)
    model = loading.model_config(config, tokenizer.load("bytes").vocab_size)
    shapes = jax.eval_shape(lambda key: transformer.init(model, key), jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(shapes))
    assert f"{total:,} parameters, 1 layers" in text
    assert "None, 'fsdp', 'model')" in text
    assert "2 copies (policy, frozen LMs)" in text


def test_a_stage_that_starts_from_another_has_its_sizes():
    first, second = tiny.config("sft"), tiny.config("pairs")
    second.model.path, second.model.sizes, second.tokenizer = "stage:first", {}, ""
    config = common.get_config()
    with config.unlocked():
        config.stages = {"first": first, "second": second}
    one, two = explain.explain(config).split("== second ==")
    assert [x for x in one.splitlines() if "parameters" in x] == [
        x for x in two.splitlines() if "parameters" in x
    ]

"""What the attacks on files begin with."""

import jax
import pytest
import tiny

from alignax.batch import LM
from alignax.models import save, transformer
from alignax.training import loading


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The Hugging Face folder of a small model that can be read."""
    config = loading.model_config(tiny.config(), 64)
    path = tmp_path_factory.mktemp("models") / "good"
    save.save(LM(config, transformer.init(config, jax.random.key(0))), path)
    return path

"""Files that are fetched by name from the Hugging Face Hub, and kept in its cache.

The package is optional: `pip install 'alignax[hub]'`.

Source: https://huggingface.co/docs/huggingface_hub/guides/download
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

PREFIX = "hf:"
WEIGHTS = (  # the files of a model that are read
    "*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.gguf",
)  # fmt: skip


def model(name: str) -> str:
    """The local folder of a model.

    Args:
      name: 'hf:OWNER/NAME', with '@REVISION' behind it for another one than the newest.

    Raises:
      ValueError: it cannot be fetched; says why.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")

    def call(hub: Any) -> str:
        return hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(WEIGHTS)
        )

    return _fetched(name, call)


def names(repo: str, revision: str = "") -> list[str]:
    """The files of a data set, in alphabetical order.

    Raises:
      ValueError: they cannot be listed; says why.
    """

    def call(hub: Any) -> list[str]:
        found = hub.HfApi().list_repo_files(
            repo, repo_type="dataset", revision=revision or None
        )
        return sorted(found)

    return _fetched(repo, call)


def file(repo: str, name: str, revision: str = "") -> str:
    """The local path of a file of a data set.

    Raises:
      ValueError: it cannot be fetched; says why.
    """

    def call(hub: Any) -> str:
        return hub.hf_hub_download(
            repo, name, repo_type="dataset", revision=revision or None
        )

    return _fetched(f"{repo}/{name}", call)


def _fetched(what: str, call: Callable[[ModuleType], Any]) -> Any:
    try:
        import huggingface_hub
    except ImportError as e:
        raise ValueError(
            f"{what}: fetching by name needs the package huggingface_hub: pip install "
            "'alignax[hub]', or give the path of a local copy"
        ) from e
    try:
        return call(huggingface_hub)
    except Exception as e:  # those of the package, of its HTTP client, and of the disk
        why = str(e).strip().split("\n")[0]
        raise ValueError(
            f"{what} cannot be fetched ({type(e).__name__}: {why}): check its name and the "
            "network, or give the path of a local copy"
        ) from e

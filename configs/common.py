"""The keys of every config and their defaults, from `alignax/training/defaults.py`."""

from alignax.training.defaults import get_config

__all__ = ["get_config"]

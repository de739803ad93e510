"""alignax: LLM alignment research in JAX. One batch layout, one kernel, one loop."""

__version__ = "0.1.0"

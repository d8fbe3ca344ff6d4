"""vLLM; no other package imports it."""

__all__ = ["engine"]

"""The commands of `grpo`."""

__all__ = ["cli"]

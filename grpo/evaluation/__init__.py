"""Evaluations: answers, statistics and the folder of `grpo eval`."""

__all__ = ["answers", "metrics", "statistics"]

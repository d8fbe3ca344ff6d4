"""Metrics of rollouts and steps, and the detection of runs that learn nothing."""

__all__ = ["guards", "health", "measures", "names", "step"]

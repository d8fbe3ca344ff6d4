"""Evaluations: answers, statistics, and the folder of `grpo eval`."""

"""Metrics of rollouts and steps, and the detection of runs that learn nothing."""

"""Side-by-side measurements, run by hand: `python -m benchmarks.<name>`."""

import grpo as grpo  # sets what Ray reads when it is imported; the modules here import ray first

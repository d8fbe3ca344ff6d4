"""Weights from the learner to the samplers: buckets, checksums, the probe, the checks, and the transfer of bytes."""

__all__ = ["probe", "transaction", "transport", "weights"]

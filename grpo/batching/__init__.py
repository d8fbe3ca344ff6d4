"""Groups to batches: rows with their account of tokens, then padded microbatches of each rank."""

__all__ = ["rows", "steps"]

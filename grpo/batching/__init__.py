"""Groups to batches: rows with their account of tokens, then padded microbatches of each rank."""

"""vLLM; no other package imports it."""

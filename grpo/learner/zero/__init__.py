"""DeepSpeed ZeRO; no other package imports it."""

"""The sampler: prompts to completions. `vllm/` has the engine."""

__all__ = ["settings", "vllm"]

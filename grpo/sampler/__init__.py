"""The sampler: prompts to completions. `vllm/` has the engine."""

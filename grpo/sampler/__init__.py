"""The sampler, which runs vLLM. No other package imports vllm."""

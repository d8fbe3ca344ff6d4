"""The objective: pure functions on tensors. It imports torch and, from this package, only itself."""

__all__ = [
    "advantages",
    "compatibility",
    "kl",
    "logprobs",
    "losses",
    "spread",
]

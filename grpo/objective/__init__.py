"""The objective: pure functions on tensors. It imports torch and, from this package, only itself."""

__all__ = [
    "advantages",
    "aggregation",
    "compatibility",
    "kl",
    "logprobs",
    "mismatch",
    "policy",
    "rows",
    "spread",
    "token_advantages",
    "values",
]

"""The objective: pure functions on tensors. It imports torch and, from this package, only itself."""

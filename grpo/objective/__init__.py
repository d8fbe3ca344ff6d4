"""The objective: pure functions on tensors. Imports torch and nothing of this package but itself."""

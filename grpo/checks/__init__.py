"""What is known before an engine starts: recipe, model, data and reward functions are checked."""

__all__ = ["check", "environment", "model_folder"]

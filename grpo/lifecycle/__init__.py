"""Start, run and end: the sequences of a training and of an evaluation, for the commands and for Python."""

__all__ = ["api", "evaluate", "evaluation_folder", "model_names", "train"]

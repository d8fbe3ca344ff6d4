"""Memory and time on paper, before anything runs."""

__all__ = ["report", "shapes"]

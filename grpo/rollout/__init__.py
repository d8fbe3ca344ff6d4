"""Prompts to groups: completions are sampled and scored as one stream."""

__all__ = ["collect"]

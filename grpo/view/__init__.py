"""The viewer of runs: it reads run folders and nothing else, and answers as JSON, HTML or text."""

__all__ = ["api", "export", "server", "text", "visible"]

"""A run on disk and in time: its folder, samples, trackers, checkpoints, progress, signals, console and timeline."""

__all__ = [
    "checkpoints",
    "compare",
    "console",
    "folder",
    "heartbeat",
    "progress",
    "results",
    "resume",
    "samples",
    "saving",
    "sessions",
    "signals",
    "timeline",
]

"""A run on disk and in time: its folder, samples, trackers, checkpoints, progress, signals, console and timeline."""

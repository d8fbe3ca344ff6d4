"""The state of the learner ranks, written to checkpoints and model folders, and restored."""

from __future__ import annotations

from pathlib import Path

from grpo.cluster.fleet import Fleet
from grpo.cluster.turns import learner_between_steps
from grpo.files import FileRecord
from grpo.run.checkpoints import LearnerRecord


class LearnerState:
    """Checkpoints of the learner in a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._timeout = fleet.config.cluster.step_timeout_s

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        with learner_between_steps(self._fleet):
            pending = [learner.save.remote(str(folder)) for learner in self._fleet.learners]
            self._fleet.watch.wait(pending, "the model to be saved", self._timeout)

    def capture(self, folder: Path) -> LearnerRecord:
        """Have every rank copy its state and start to write it to `folder`. Return the parts that are not tensors."""
        with learner_between_steps(self._fleet):
            pending = [learner.capture.remote(str(folder)) for learner in self._fleet.learners]
            counters = self._fleet.watch.wait(pending, "the checkpoint's copy", self._timeout)[0]
        config = self._fleet.config
        return {**counters, "ranks": config.cluster.learner_ranks, "zero_stage": config.learner.zero_stage}

    def state_bytes(self) -> int:
        """Return the approximate size of a learner checkpoint, in bytes."""
        pending = [self._fleet.learners[0].state_bytes.remote()]
        return int(self._fleet.watch.wait(pending, "the size of a checkpoint", self._timeout)[0])

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """Return the written files by name, or None while a rank is still writing."""
        pending = [learner.captured.remote(wait) for learner in self._fleet.learners]
        records = self._fleet.watch.wait(pending, "the checkpoint to be written", self._timeout)
        if None in records:
            return None
        return {f"rank-{rank}.safetensors": record for rank, record in enumerate(records)}

    def restore(self, folder: Path, learner: LearnerRecord) -> None:
        """Restore the learner from a checkpoint whose files have been verified."""
        files = [folder / "learner" / f"rank-{rank}.safetensors" for rank in range(learner["ranks"])]
        pending = [rank.restore.remote(files, learner) for rank in self._fleet.learners]
        start = self._fleet.config.cluster.start_timeout_s
        self._fleet.watch.wait(pending, "the learner to load the checkpoint", start)

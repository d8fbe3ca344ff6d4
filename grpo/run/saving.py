"""Save checkpoints in the background: the learner ranks copy their state, and write it while the run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from grpo.config import Config
from grpo.files import FileRecord, seal
from grpo.run import checkpoints
from grpo.run.checkpoints import LearnerRecord, Manifest, plain
from grpo.run.folder import is_disk_full, versions
from grpo.run.progress import ProgressState


class Captured(Protocol):
    """Interface of the learner for checkpoints; implemented by `grpo.cluster.engines.LearnerState`."""

    def capture(self, folder: Path) -> LearnerRecord: ...

    def state_bytes(self) -> int: ...

    def captured(self, *, wait: bool) -> dict[str, FileRecord] | None: ...

    def save(self, folder: Path) -> None: ...


class Saver:
    """Writer of one checkpoint at a time: `save` begins it, `poll` publishes it when its files are on the disk."""

    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        engines: Captured,
        fingerprints: Callable[[], Mapping[str, str]],
        flush: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """`flush`: waits until the metrics and samples of all steps so far are on the disk."""
        self._config, self._run, self._engines = config, run, engines
        self._fingerprints, self._flush, self._say = fingerprints, flush, say
        self._pending: tuple[Path, Manifest] | None = None
        """The folder that is being written, and its manifest without the files."""
        self._size = 0
        """Bytes of the previous checkpoint."""

    def save(self, step: int, driver: ProgressState, metrics: Mapping[str, float]) -> None:
        """Begin a checkpoint of the state after `step`. A checkpoint in progress is finished first. Do nothing if this
        step already has a checkpoint.

        Raises OSError when the disk has no room.
        """
        self.poll(wait=True)
        if checkpoints.folder_of(self._run, step).exists():
            return
        partial = checkpoints.begin(self._run, step, need_bytes=self._size or self._engines.state_bytes())
        learner = self._engines.capture(partial / "learner")
        if self._config.run.save_model:
            self._engines.save(partial / "model")
        manifest = Manifest(
            format=checkpoints.FORMAT,
            step=step,
            config=plain(self._config),
            fingerprints=self._fingerprints(),
            versions=versions(),
            driver=driver,
            learner=learner,
            metrics=metrics,
            files={},
        )
        self._pending = partial, manifest

    def save_last(self, step: int, driver: ProgressState, metrics: Mapping[str, float]) -> None:
        """Write the checkpoint from which a longer run can resume, with `run.save_last`. The run does not depend on it:
        a full disk is only reported."""
        if not self._config.run.save_last:
            return
        try:
            self.save(step, driver, metrics)
            self.poll(wait=True)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._say(f"the last checkpoint could not be written: {error} (run.save_last=false turns it off)")

    def poll(self, *, wait: bool = False) -> None:
        """Publish the pending checkpoint once its files are written, and delete checkpoints that are no longer kept."""
        if self._pending is None:
            return
        records = self._engines.captured(wait=wait)
        if records is None:
            return
        partial, manifest = self._pending
        files = {f"learner/{name}": record for name, record in records.items()}
        if self._config.run.save_model:
            written = [path for path in (partial / "model").rglob("*") if path.is_file()]
            files |= {str(path.relative_to(partial)): seal(path) for path in written}
        self._flush()  # a run resumed from here has all data of the steps before
        target = checkpoints.publish(partial, replace(manifest, files=files))
        self._pending = None
        self._size = sum(record.bytes for record in files.values())
        c = self._config.run
        checkpoints.retire(self._run, keep_last=c.keep_last, keep_every=c.keep_every, best_by=c.keep_best)
        self._say(f"checkpoint {target.name}, {self._size / 2**20:.1f} MiB")

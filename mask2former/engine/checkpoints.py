"""Checkpoints in the layout of Detectron2's trainer, so that a training can change engines.

A file is written under another name, flushed to the disk and renamed: whatever kills the program, a file that has
its proper name is whole, and ``last_checkpoint`` names such a file.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mask2former.checkpoint import atomic_file, write_atomically
from mask2former.engine.yaml_files import ConfigError
from mask2former.weight_files import read_weights

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
_PROBE = "writable"  # written and removed, to see that the folder can be written to
_TEMPORARY = ".*.tmp"  # how `atomic_file` ends the name of a file that is not finished; it begins with a dot


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; the message says what there is instead."""


class CheckpointFolder:
    """The checkpoints in an output folder. One process writes."""

    def __init__(self, folder: str | Path, *, kept: int | None = None) -> None:
        """Set up.

        Args:
            folder: is made when something is written.
            kept: how many periodic checkpoints stay, the last ones; None: all.
        """
        self.folder = Path(folder)
        self.kept = kept

    def prepare(self) -> None:
        """`check_writable`, and remove what a killed program has left unfinished.

        Raises:
            ConfigError: if the folder cannot be written to.
        """
        self.check_writable()
        for name in ("*.pth", _TAG, _PROBE):
            for leftover in self.folder.glob(f".{name}{_TEMPORARY}"):
                leftover.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Make the folder, and see that it can be written to.

        Raises:
            ConfigError: if it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / _PROBE, b"")
            (self.folder / _PROBE).unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"OUTPUT_DIR must be a folder that can be written to, got {str(self.folder)!r}: {reason}"
            ) from error

    def save(self, name: str, content: Mapping[str, Any], *, is_last: bool = True) -> Path:
        """Write a checkpoint.

        Args:
            name: of the file without ending.
            content: what `torch.save` takes.
            is_last: training resumes from it.

        Raises:
            CheckpointError: if it cannot be written; everything that was there before still is.
        """
        path = self.folder / f"{name}.pth"
        try:
            with atomic_file(path) as file:
                torch.save(dict(content), file)
            if is_last:
                write_atomically(self.folder / _TAG, path.name.encode())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise CheckpointError(self._failure(path, error)) from error
        logger.info("Saved %s", path)
        self._prune()
        return path

    def last(self) -> Path | None:
        """The checkpoint to resume from; None if there is none.

        Raises:
            CheckpointError: if ``last_checkpoint`` names a file that is not there.
        """
        tag, name = self.folder / _TAG, self._name_of_last()
        if name is None:
            return None
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{tag} names {path.name}, which is not in the folder; write the name of another checkpoint into it, "
                "or train without --resume"
            )
        return path

    def load(self, path: Path) -> Mapping[str, Any]:
        """The content of a checkpoint, on the CPU.

        Raises:
            CheckpointError: if it is damaged or holds no model.
        """
        try:
            content = read_weights(path)
        except ValueError as error:
            raise CheckpointError(f"{error}; write the name of another checkpoint into {self.folder / _TAG}") from error
        if "model" not in content:
            raise CheckpointError(f"{path} must hold a 'model', got {sorted(map(str, content))[:10]}")
        return content

    def _prune(self) -> None:
        if self.kept is None:
            return
        periodic = sorted(self.folder.glob("model_[0-9]*.pth"))
        for old in periodic[: -self.kept]:
            if old.name != self._name_of_last():
                old.unlink(missing_ok=True)

    def _name_of_last(self) -> str | None:
        tag = self.folder / _TAG
        return tag.read_text("utf-8").strip() if tag.exists() else None

    def _failure(self, path: Path, error: Exception) -> str:
        last = self._name_of_last()
        rest = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        return f"{path} could not be written: {_reason(error)}; {rest}, and --resume goes on from it when there is room"


def _reason(error: BaseException) -> str:
    """What the system said; torch hides it behind a message about positions in the file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]

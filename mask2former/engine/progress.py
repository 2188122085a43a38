"""What a training says about itself: progress bar, lines of text, metrics.json, TensorBoard, Weights & Biases."""

import json
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mask2former.engine.yaml_files import ConfigError

logger = logging.getLogger(__name__)

_WINDOW = 20  # iterations between two lines, and of the medians in them, as in Detectron2


class TrainingLog:
    """Collects the numbers of each iteration and writes every twentieth, under Detectron2's names.

    Losses and times are medians of the last 20 iterations, everything else is of the last one. A log that cannot be
    written, say on a full disk, is given up with a warning: it must not end the training.
    """

    def __init__(
        self, folder: Path, *, start: int, max_iter: int, images_per_batch: int, wandb_project: str | None = None
    ) -> None:
        """Set up.

        Args:
            folder: of metrics.json and TensorBoard's files.
            start, max_iter: the first iteration, and the number of all.
            images_per_batch: for images/s.
            wandb_project: of Weights & Biases.

        Raises:
            ConfigError: if Weights & Biases is asked for and not installed.
        """
        if wandb_project is not None and find_spec("wandb") is None:
            raise ConfigError(
                f"LOGGING.WANDB_PROJECT needs the package wandb, which is not installed, got {wandb_project!r}"
            )
        self._file = folder / "metrics.json"
        self._max_iter = max_iter
        self._images = images_per_batch
        self._windows: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._is_broken = False
        self._board = _tensorboard(folder)
        self._wandb = _wandb(wandb_project, folder) if wandb_project else None
        self._bar = tqdm(total=max_iter, initial=start, unit="it", disable=None, dynamic_ncols=True)
        self._last_end = time.perf_counter()

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of an iteration: losses, lr, data_time, memory_mb."""
        now = time.perf_counter()
        for name, value in {**numbers, "time": now - self._last_end}.items():
            self._windows[name].append(value)
        self._last_end = now
        self._bar.update()
        if (iteration + 1) % _WINDOW == 0 or iteration + 1 == self._max_iter:
            self._write_line(iteration)

    def skip(self) -> None:
        """An iteration has changed nothing: its numbers do not count."""
        self._bar.update()
        self.leave_out()

    def results(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Take the results of an evaluation, which does not count as time of an iteration."""
        self._write(iteration, numbers)
        self.leave_out()

    def picture(self, iteration: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Take a drawing, (H, W, 3) uint8."""
        if self._board is not None:
            self._board.add_image(name, pixels, iteration, dataformats="HWC")

    def leave_out(self) -> None:
        """The time since the last step belongs to no iteration, as that of writing a checkpoint."""
        self._last_end = time.perf_counter()

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_line(self, iteration: int) -> None:
        numbers = {
            name: statistics.median(w) if "loss" in name or name in ("time", "data_time") else w[-1]
            for name, w in self._windows.items()
            if w
        }
        seconds = numbers["time"] * (self._max_iter - iteration - 1)
        numbers |= {"eta_seconds": seconds, "images_per_second": self._images / max(numbers["time"], 1e-9)}
        self._write(iteration, numbers)
        losses = "  ".join(f"{name}: {value:.4g}" for name, value in numbers.items() if "loss" in name)
        text = (
            f"eta: {timedelta(seconds=int(seconds))}  iter: {iteration}  {losses}  time: {numbers['time']:.4f}  "
            f"data_time: {numbers['data_time']:.4f}  lr: {numbers['lr']:.5g}  "
            f"images/s: {numbers['images_per_second']:.1f}  max_mem: {numbers['memory_mb']:.0f}M"
        )
        if self._bar.disable:
            logger.info(text)
        else:
            self._bar.set_postfix_str(f"loss {numbers['total_loss']:.3f}, lr {numbers['lr']:.2g}", refresh=False)
            with self._bar.external_write_mode():
                logger.info(text)

    def _write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        if self._is_broken:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**numbers, "iteration": iteration}, sort_keys=True) + "\n")
            if self._board is not None:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, iteration)
                self._board.flush()
        except OSError as error:
            self._is_broken = True
            logger.warning("%s cannot be written, so the log ends here: %s", self._file, error.strerror or error)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=iteration)


def _tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files, None where it is not installed."""
    if find_spec("tensorboard") is None:
        logger.info("TensorBoard is not installed: metrics.json alone has the numbers")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _wandb(project: str, folder: Path) -> Any:
    import wandb

    return wandb.init(project=project, dir=str(folder), resume="allow")

"""Counting in the background: the host's work for one image is done while the model predicts the next one."""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from mask2former.data.records import Record
from mask2former.evaluation.tasks import Result, Task

logger = logging.getLogger(__name__)

_WAITING = 2  # images: one in work, one to go on with; more would only take memory


class BackgroundUpdates:
    """Updates tasks in one thread, one image after the other in the order given, so that timing changes no number.

    What the metrics need is copied to the host before ``update`` returns; reading the ground truth, run lengths and
    counting are left to the thread. Where it falls behind, ``update`` waits. Use it in a ``with`` statement, or call
    ``finish`` before the metrics are read; leaving a ``with`` by an exception drops images that wait.

    An error of the thread is logged with the name of its image and raised by the next ``update`` or by ``finish``.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Set up; no thread is there before the first image, so that loaders can fork theirs first."""
        self._tasks = tuple(tasks)
        self._executor: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[str, Future[None]]] = deque()

    def update(self, record: Record, result: Result) -> None:
        """As `Task.update` of all tasks, but may return before it is done."""
        taken = [task.take(result) for task in self._tasks]
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
        self._pending.append((_name(record), self._executor.submit(self._count, record, taken)))
        while len(self._pending) > _WAITING:
            self._finish_first()

    def finish(self) -> None:
        """Wait until all images are counted, and end the thread."""
        while self._pending:
            self._finish_first()
        self.cancel()

    def cancel(self) -> None:
        """Drop the images that wait, and end the thread after the one that it is at."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def __enter__(self) -> "BackgroundUpdates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.cancel()

    def _count(self, record: Record, taken: Sequence[Any]) -> None:
        for task, part in zip(self._tasks, taken, strict=True):
            task.count(record, part)

    def _finish_first(self) -> None:
        name, future = self._pending[0]
        error = future.exception()
        self._pending.popleft()
        if error is not None:
            logger.error("Evaluating image %s failed", name)
            self.cancel()
            raise error


def _name(record: Record) -> str:
    return str(record.get("file_name", record.get("image_id")))

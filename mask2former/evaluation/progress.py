"""How far an evaluation is, and how fast."""

import logging
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 30.0


def with_progress(images: Iterable[T], name: str, *, here: int, overall: int, is_shown: bool = True) -> Iterator[T]:
    """Passes images on and shows how many there were: a bar on a terminal, else a line of the log now and then.

    Ends with a line of the log that has the images per second.

    Args:
        images: of this process.
        name: of the data set.
        here: number of images of this process.
        overall: number of images of all processes, which take about as long as this one.
        is_shown: False shows nothing, for all processes but one.
    """
    start = last_line = time.perf_counter()
    bar = tqdm(
        images, desc=f"evaluating {name}", total=here, unit="image", disable=None if is_shown else True, leave=False
    )
    for done, image in enumerate(bar, start=1):
        yield image
        now = time.perf_counter()
        if is_shown and bar.disable and now - last_line > _SECONDS_BETWEEN_LINES:
            last_line = now
            everywhere = done * overall / here
            left = timedelta(seconds=int((now - start) / done * (here - done)))
            rate = everywhere / (now - start)
            logger.info("%s: %d of %d images, %.1f images/s, %s left", name, everywhere, overall, rate, left)
    seconds = time.perf_counter() - start
    if is_shown:
        rate = overall / max(seconds, 1e-9)
        logger.info("Predicted %d images of %s in %.0f s, %.1f images/s", overall, name, seconds, rate)

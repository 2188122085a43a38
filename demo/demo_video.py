"""Segments videos and cameras frame by frame, into a file or a window."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from demo_inputs import Video
    from demo_models import Segmenter
    from demo_window import Window
    from numpy.typing import NDArray

    from mask2former.video_files import VideoReader

Clock = Callable[[], float]
_RECENT = 30  # frames that the current frame rate is taken from


class FrameRate:
    """Counts frames and the seconds they take, from the moment it is made."""

    def __init__(self, clock: Clock) -> None:
        self.frames = 0
        self._clock = clock
        self._start = clock()
        self._times = deque([self._start], maxlen=_RECENT + 1)

    def tick(self) -> None:
        """Count a frame."""
        self._times.append(self._clock())
        self.frames += 1

    @property
    def recent(self) -> float:
        """Frames per second lately."""
        return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)

    @property
    def mean(self) -> float:
        """Frames per second since the start."""
        return self.frames / max(self._times[-1] - self._start, 1e-9)

    @property
    def elapsed(self) -> float:
        """Seconds from the start to now."""
        return self._clock() - self._start


def video_to_file(segmenter: Segmenter, video: Video, output: Path, clock: Clock = time.perf_counter) -> bool:
    """Segment a video and write it with the results drawn over its frames; prints a line on it.

    A video that breaks off is reported, and the file has the frames before; so it is after Ctrl-C. A camera that
    gives frames faster than they can be segmented loses some, and others are repeated, so that the speed is right.

    Args:
        segmenter: the model.
        video: a file, or the index of a camera.
        output: the file to write.
        clock: seconds.

    Returns:
        Whether all of it could be read.

    Raises:
        OSError, ValueError: if the video cannot be opened or the file not be written; then there is no file.
    """
    from mask2former.video_files import VideoWriter, read_video

    problems: list[str] = []
    with read_video(video) as reader:
        rate, writer = FrameRate(clock), VideoWriter(output, reader.fps, reader.size)
        written = 0
        try:
            with writer:
                for drawing in _drawings(segmenter, reader, rate, problems):
                    due = int(rate.elapsed * reader.fps) + 1 if isinstance(video, int) else written + 1
                    for _ in range(due - written):
                        writer.write(drawing)
                    written = max(due, written)
        except KeyboardInterrupt:
            print(_line(reader, rate, f" -> {writer.path.name}"), flush=True)
            raise
    print(_line(reader, rate, f" -> {writer.path.name}"), flush=True)
    for problem in problems:
        print(f"demo: {problem}; {writer.path} has the frames before", file=sys.stderr)
    return not problems


def video_to_window(segmenter: Segmenter, video: Video, window: Window, clock: Clock = time.perf_counter) -> bool:
    """Segment a video and show it, not faster than it is meant to be; prints a line on it.

    Args:
        segmenter: the model.
        video: a file, or the index of a camera.
        window: shows the frames.
        clock: seconds.

    Returns:
        Whether all of it could be read.

    Raises:
        WindowClosedError: if the user closes the window.
        OSError, ValueError: if the video cannot be opened.
    """
    from mask2former.video_files import read_video

    problems: list[str] = []
    with read_video(video) as reader:
        rate = FrameRate(clock)
        try:
            for drawing in _drawings(segmenter, reader, rate, problems):
                early = 0.0 if isinstance(video, int) else (rate.frames + 1) / reader.fps - rate.elapsed
                window.show(drawing, f"{reader.name} - {rate.recent:.1f} frames a second", max(1, round(1000 * early)))
        finally:
            print(_line(reader, rate, ""), flush=True)
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return not problems


def _drawings(
    segmenter: Segmenter, reader: VideoReader, rate: FrameRate, problems: list[str]
) -> Iterator[NDArray[np.uint8]]:
    """The frames with their results, one at a time in memory; what ends them early goes into ``problems``."""
    from tqdm import tqdm

    draw = _drawer(segmenter)
    with tqdm(total=reader.count, unit="frame", disable=None) as progress:
        try:
            for frame in reader:
                drawing = draw(frame)
                del frame
                yield drawing
                rate.tick()
                progress.set_postfix_str(f"{rate.recent:.1f} fps", refresh=False)
                progress.update()
        except (OSError, ValueError) as error:
            problems.append(str(error))


def _drawer(segmenter: Segmenter) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Segments and draws a frame; panoptic segments and instances keep their ids and colours from frame to frame."""
    if segmenter.task == "semantic":
        return lambda frame: segmenter.draw(frame, segmenter(frame))

    from mask2former.video import VideoSegmenter
    from mask2former.visualizer import Visualizer

    predictor = segmenter.predictor
    track = VideoSegmenter(predictor, task=segmenter.task, threshold=segmenter.threshold)
    visualizer = Visualizer(predictor.categories)

    def draw(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        result = track(frame)
        return visualizer.draw_panoptic(frame, result.ids, result.segments, tracked=True)

    return draw


def _line(reader: VideoReader, rate: FrameRate, renamed: str) -> str:
    name = Path(reader.name).name
    return f"{name}{renamed}: {rate.frames} frames, {rate.mean:.1f} frames a second"

"""Video files and cameras: read and written frame by frame with OpenCV, in constant memory."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

WRITABLE_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4")
DEFAULT_FPS = 30.0  # of cameras and files that do not say
# Containers that count their frames; in others the count is a guess from the duration and may be far off.
_COUNTING_SUFFIXES = {".avi", ".m4v", ".mov", ".mp4"}
_LARGEST_FPS = 480.0  # files made by browsers claim 1000, the resolution of their clock


class VideoReader:
    """The frames of a video, once, in order; made by `read_video`.

    Attributes:
        name: the file's path, or "camera 0".
        fps: frames per second, `DEFAULT_FPS` where the source does not say.
        count: frames that a file says it has, which is exact for .mp4, .m4v, .mov and .avi; None if it does not say,
            and for cameras.
        size: (height, width) of a frame.
    """

    def __init__(self, capture: Any, source: Path | int) -> None:
        """Read the first frame of an open ``cv2.VideoCapture``.

        Raises:
            ValueError: if there is none.
        """
        import cv2

        self._capture, self._source = capture, source
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        self._next = self._read()
        if self._next is None:
            raise ValueError(f"{self.name} has no frame that can be read")
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = float(fps) if 0 < fps <= _LARGEST_FPS else DEFAULT_FPS
        self.count = None if isinstance(source, int) or not 0 < count < 2**31 else int(count)
        self.size: tuple[int, int] = (self._next.shape[0], self._next.shape[1])

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """(height, width, 3) uint8 RGB, turned upright as the file says; each frame is a new array.

        Raises:
            OSError: if a camera stops.
            ValueError: after the last frame that can be read, if the file promised more of them.
        """
        done = 0
        while self._next is not None:
            frame, self._next = self._next, None  # the only reference, so that one frame is held at a time
            yield frame
            del frame
            done += 1
            self._next = self._read()
        if isinstance(self._source, int):
            raise OSError(f"{self.name} gives no more frames")
        counts = self._source.suffix.lower() in _COUNTING_SUFFIXES
        # Some writers count a frame or two that no decoder shows.
        if counts and self.count is not None and done < 0.9 * self.count - 2:
            raise ValueError(f"{self.name} breaks off after {done} of {self.count} frames: it is damaged or incomplete")

    def _read(self) -> NDArray[np.uint8] | None:
        import cv2

        found, pixels = self._capture.read()
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if found else None


@contextmanager
def read_video(source: str | Path | int) -> Iterator[VideoReader]:
    """Open a video file or a camera; it is closed at the end of the ``with``.

    Args:
        source: path of a file, or index of a camera, from 0.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the camera cannot be opened, is busy or gives no frame.
        ValueError: if the file is no video, or damaged from its start.
    """
    import cv2

    source = source if isinstance(source, int) else Path(source).expanduser()
    if isinstance(source, Path) and not source.is_file():
        reason = "is a folder, not a video file" if source.is_dir() else "does not exist"
        raise FileNotFoundError(f"{source} {reason}")
    if isinstance(source, Path):
        source.open("rb").close()  # OpenCV does not say that it may not read a file
    with _quiet():
        capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        if isinstance(source, int):
            yield _camera(capture, source)
        elif not capture.isOpened():
            raise ValueError(f"{source} is no video that can be read, or it is damaged")
        else:
            yield VideoReader(capture, source)
    finally:
        capture.release()


class VideoWriter:
    """Writes a video that appears complete or not at all, as a context manager.

    Frames go to a hidden file beside ``path``, which is renamed at the end of the ``with``. Ctrl-C (KeyboardInterrupt)
    ends the video early: what was written until then is a complete file. After any other exception nothing is left.

    Attributes:
        path: where the video will be. Where MPEG-4 cannot be encoded it is a Motion JPEG file, and ``path`` ends in
            .avi whatever was asked for.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]) -> None:
        """Check the arguments; nothing is written before the ``with``.

        Args:
            path: of the file, ending in one of `WRITABLE_SUFFIXES`; an older file is replaced.
            fps: frames per second, from 0.1 to 480; rounded to thousandths, above 65 to hundredths, which is what
                MPEG-4 can store.
            size: (height, width) of every frame. Encoders want even numbers: odd ones are made even by repeating the
                last row or column.

        Raises:
            ValueError: if an argument is out of its range.
        """
        self.path = Path(path).expanduser()
        if self.path.suffix.lower() not in WRITABLE_SUFFIXES:
            raise ValueError(f"path must end in one of {', '.join(WRITABLE_SUFFIXES)}, got {path}")
        if not 0.1 <= fps <= _LARGEST_FPS:
            raise ValueError(f"fps must be in [0.1, {_LARGEST_FPS:g}], got {fps}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (height, width), both at least 1, got {size}")
        self._fps, self._size = round(fps, 2 if fps > 65 else 3), (size[0], size[1])
        self._writer: Any = None
        self._temporary = self.path
        self._written = 0

    def __enter__(self) -> "VideoWriter":
        """Start.

        Raises:
            OSError: if the file cannot be written, or no encoder works.
        """
        for suffix, codec in ((self.path.suffix.lower(), "mp4v"), (".avi", "MJPG")):
            final = self.path if suffix == self.path.suffix.lower() else self.path.with_suffix(suffix)
            temporary = final.with_name(f".{final.stem}.{secrets.token_hex(4)}.tmp{suffix}")
            temporary.open("xb").close()  # says why it cannot be written, which OpenCV does not
            writer = _open_writer(temporary, codec, self._fps, self._even_size())
            if writer.isOpened():
                self._writer, self._temporary, self.path = writer, temporary, final
                return self
            writer.release()
            temporary.unlink(missing_ok=True)
        raise OSError(f"{self.path} cannot be written: OpenCV encodes neither MPEG-4 (mp4v) nor Motion JPEG here")

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame.

        Args:
            frame: (height, width, 3) uint8 RGB.

        Raises:
            ValueError: if shape or type are others, or the ``with`` is over.
        """
        import cv2

        if self._writer is None:
            raise ValueError("write needs an open VideoWriter: use it inside its with statement")
        if frame.shape != (*self._size, 3) or frame.dtype != np.uint8:
            raise ValueError(f"frame must be {(*self._size, 3)} uint8, got {frame.shape} {frame.dtype}")
        height, width = self._even_size()
        pixels = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
        if (height, width) != self._size:
            bottom, right = height - self._size[0], width - self._size[1]
            pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        self._writer.write(pixels)
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish, or remove what was written.

        Raises:
            ValueError: if no frame was written.
            OSError: if the file did not become a readable video, as on a full disk.
        """
        writer, self._writer = self._writer, None
        try:
            writer.release()
            if kind is None or (issubclass(kind, KeyboardInterrupt) and self._written):
                self._finish()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._written:
            raise ValueError(f"{self.path} is not written: it got no frame")
        _check(self._temporary, self._written, self.path)
        with self._temporary.open("rb+") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self.path)

    def _even_size(self) -> tuple[int, int]:
        return self._size[0] + self._size[0] % 2, self._size[1] + self._size[1] % 2


def _camera(capture: Any, index: int) -> VideoReader:
    if not capture.isOpened():
        raise OSError(f"camera {index} cannot be opened: there is none, or another program uses it")
    try:
        return VideoReader(capture, index)
    except ValueError as error:
        raise OSError(f"camera {index} gives no frame") from error


def _open_writer(path: Path, codec: str, fps: float, size: tuple[int, int]) -> Any:
    import cv2

    with _quiet():
        return cv2.VideoWriter(str(path), int.from_bytes(codec.encode(), "little"), fps, (size[1], size[0]))


def _check(temporary: Path, written: int, path: Path) -> None:
    """OpenCV does not report failing writes, so the file itself must say that it is complete."""
    import cv2

    with _quiet():
        capture = cv2.VideoCapture(str(temporary))
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        capture.set(cv2.CAP_PROP_POS_FRAMES, written - 1)
        has_last_frame = capture.grab()
        capture.release()
    if not has_last_frame or abs(count - written) > 1:  # .mkv gives the count through the duration, with rounding
        raise OSError(f"{path} could not be written to its end ({written} frames): is the disk full?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without OpenCV's own lines about what cannot be opened: the caller raises a sentence."""
    import cv2

    logging = getattr(cv2.utils, "logging", None)  # not in OpenCV 4.5
    if logging is None:
        yield
        return
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)

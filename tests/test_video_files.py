"""Video files: what is written comes back, in constant memory, and nothing half-written is left."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mask2former import video_files
from mask2former.video_files import DEFAULT_FPS, WRITABLE_SUFFIXES, VideoReader, VideoWriter, read_video

ROOT = Path(__file__).resolve().parents[1]


def flat(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame of one colour that tells its index and the order of the channels."""
    return np.full((height, width, 3), (200, 4 * index, 30), dtype=np.uint8)


def noise(seed: int) -> np.ndarray:
    """A frame that no codec makes small."""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def write(path: Path, count: int, *, fps: float = 10, height: int = 48, width: int = 64) -> Path:
    with VideoWriter(path, fps, (height, width)) as video:
        for index in range(count):
            video.write(flat(index, height, width))
    return video.path


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_frames_come_back_in_order_and_in_rgb(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"video{suffix}", 20)
    with read_video(path) as video:
        assert (video.name, video.fps, video.count, video.size) == (str(path), 10, 20, (48, 64))
        frames = list(video)
    assert len(frames) == 20
    for index, frame in enumerate(frames):
        assert frame.dtype == np.uint8
        np.testing.assert_allclose(frame, flat(index), atol=8)  # the codec's error
    assert list(tmp_path.iterdir()) == [path]


def test_frames_are_separate_arrays(tmp_path: Path) -> None:
    with read_video(write(tmp_path / "video.mp4", 3)) as video:
        first, second, _ = video
    assert not np.shares_memory(first, second)
    assert first.flags.c_contiguous


@pytest.mark.parametrize("fps", [0.1, 23.976, 30000 / 1001, 59.94, 1000 / 7, 480])
def test_frames_per_second_are_kept(tmp_path: Path, fps: float) -> None:
    with read_video(write(tmp_path / "video.mp4", 2, fps=fps)) as video:
        assert video.fps == pytest.approx(fps, abs=0.006)


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_odd_sizes_are_made_even_without_losing_pixels(tmp_path: Path, suffix: str) -> None:
    frame = np.zeros((47, 63, 3), dtype=np.uint8)
    frame[:, 48:] = 255
    path = tmp_path / f"video{suffix}"
    with VideoWriter(path, 5, (47, 63)) as video:
        video.write(frame)
    with read_video(path) as reader:
        (got,) = reader
    assert got.shape == (48, 64, 3)
    assert got[:, 50:].min() > 240
    assert got[:, :46].max() < 15


def test_an_older_file_is_replaced_and_only_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "video.mp4", 3)
    old = path.read_bytes()
    with VideoWriter(path, 10, (48, 64)) as video:
        for index in range(30):
            video.write(flat(index))
        assert path.read_bytes() == old
    with read_video(path) as reader:
        assert reader.count == 30


def test_ctrl_c_leaves_the_frames_so_far(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 10, (48, 64)) as video:
        for index in range(7):
            video.write(flat(index))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]
    with read_video(path) as reader:
        assert len(list(reader)) == 7


@pytest.mark.parametrize("frames", [0, 5])
def test_an_error_leaves_nothing_and_the_older_file_alone(tmp_path: Path, frames: int) -> None:
    path = write(tmp_path / "video.mp4", 3)
    old = path.read_bytes()
    with pytest.raises(RuntimeError, match="model"), VideoWriter(path, 10, (48, 64)) as video:
        for index in range(frames):
            video.write(flat(index))
        raise RuntimeError("the model failed")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == old


def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "video.mp4", 10, (48, 64)):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no frame"), VideoWriter(tmp_path / "video.mp4", 10, (48, 64)):
        pass
    assert not list(tmp_path.iterdir())


def without_codecs(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As an OpenCV that cannot encode these."""
    real = cv2.VideoWriter
    codes = {cv2.VideoWriter_fourcc(*codec) for codec in missing}

    def opened(path: str, code: int, *others: Any) -> Any:
        return real() if code in codes else real(path, code, *others)

    monkeypatch.setattr(cv2, "VideoWriter", opened)


def test_motion_jpeg_where_there_is_no_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_codecs(monkeypatch, "mp4v")
    path = write(tmp_path / "video.mp4", 5)
    assert path == tmp_path / "video.avi"
    assert list(tmp_path.iterdir()) == [path]
    with read_video(path) as reader:
        assert len(list(reader)) == 5


def test_no_codec_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_codecs(monkeypatch, "mp4v", "MJPG")
    with pytest.raises(OSError, match=r"encodes neither MPEG-4 .* nor Motion JPEG"):
        write(tmp_path / "video.mp4", 5)
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from mask2former.video_files import VideoWriter
from tests.test_video_files import noise
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try:
        with VideoWriter(path, 10, (64, 64)) as video:
            for index in range(100):
                video.write(noise(index))
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_a_full_disk_is_noticed(tmp_path: Path) -> None:
    """OpenCV says nothing when it cannot write; a limit on the file size stands for the disk."""
    paths = [str(tmp_path / f"video{suffix}") for suffix in (".mp4", ".avi", ".mkv")]
    command = [sys.executable, "-c", FULL_DISK, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = [f"{path} could not be written to its end (100 frames): is the disk full?" for path in paths]
    assert done.stdout.splitlines() == expected, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("video.webm", 10, (48, 64)), r"path must end in one of .*, got video.webm"),
        (("video", 10, (48, 64)), r"path must end in one of .*, got video"),
        (("video.mp4", 0, (48, 64)), r"fps must be in \[0.1, 480\], got 0"),
        (("video.mp4", float("nan"), (48, 64)), r"fps must be in .*, got nan"),
        (("video.mp4", 10, (0, 64)), r"size must be \(height, width\), both at least 1, got \(0, 64\)"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoWriter(*arguments)


@pytest.mark.parametrize(
    "frame", [np.zeros((64, 48, 3), np.uint8), np.zeros((48, 64), np.uint8), np.zeros((48, 64, 3), np.float32)]
)
def test_frames_of_another_kind_are_refused(tmp_path: Path, frame: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match=r"frame must be \(48, 64, 3\) uint8, got"),
        VideoWriter(tmp_path / "video.mp4", 10, (48, 64)) as video,
    ):
        video.write(frame)
    assert not list(tmp_path.iterdir())


def test_writing_needs_the_with(tmp_path: Path) -> None:
    video = VideoWriter(tmp_path / "video.mp4", 10, (48, 64))
    with pytest.raises(ValueError, match="inside its with"):
        video.write(flat(0))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "no" / "video.mp4", 1)


def test_sources_that_are_no_video(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for path, kind, message in (
        (tmp_path / "missing.mp4", FileNotFoundError, "does not exist"),
        (tmp_path, FileNotFoundError, "is a folder"),
        (text, ValueError, "is no video that can be read"),
        (empty, ValueError, "is no video that can be read"),
    ):
        with pytest.raises(kind, match=message), read_video(path):
            pass


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(OSError, match=r"^camera 987 cannot be opened: there is none"), read_video(987):
        pass


def truncated(path: Path) -> Path:
    with VideoWriter(path, 10, (64, 64)) as video:
        for index in range(50):
            video.write(noise(index))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_truncated_file_gives_its_frames_and_then_an_error(tmp_path: Path) -> None:
    done = 0
    path = truncated(tmp_path / "video.avi")
    with pytest.raises(ValueError, match=r"breaks off after .* of 50 frames") as raised, read_video(path) as video:
        for _ in video:
            done += 1
    assert 5 < done < 30
    assert f"after {done} of" in str(raised.value)


def test_a_truncated_file_whose_index_is_lost(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"), read_video(truncated(tmp_path / "video.mp4")):
        pass


class Camera:
    """Stands for cv2.VideoCapture: some frames, and numbers as drivers give them."""

    def __init__(self, frames: int, fps: float) -> None:
        self.frames, self.fps, self.released = frames, fps, False

    def __call__(self, index: int) -> "Camera":
        return self

    def isOpened(self) -> bool:  # noqa: N802, OpenCV's name
        return True

    def get(self, key: int) -> float:
        return self.fps if key == cv2.CAP_PROP_FPS else -1.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.frames -= 1
        return (True, flat(1)[..., ::-1].copy()) if self.frames >= 0 else (False, None)

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize(("said", "fps"), [(0, DEFAULT_FPS), (float("nan"), 30), (1000, 30), (25, 25)])
def test_a_camera_that_stops(monkeypatch: pytest.MonkeyPatch, said: float, fps: float) -> None:
    camera = Camera(3, said)
    monkeypatch.setattr(cv2, "VideoCapture", camera)
    seen = []
    with pytest.raises(OSError, match="camera 0 gives no more frames"), read_video(0) as video:
        assert (video.fps, video.count, video.name) == (fps, None, "camera 0")
        for frame in video:
            seen.append(frame)
    assert len(seen) == 3
    np.testing.assert_array_equal(seen[0], flat(1))
    assert camera.released


def test_a_camera_without_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(0, 30)
    monkeypatch.setattr(cv2, "VideoCapture", camera)
    with pytest.raises(OSError, match="camera 0 gives no frame"), read_video(0):
        pass
    assert camera.released


def test_the_reader_holds_one_frame(tmp_path: Path) -> None:
    """A frame lives only as long as the caller keeps it."""
    path = write(tmp_path / "video.mp4", 30)
    alive: list[weakref.ref[np.ndarray]] = []
    with read_video(path) as video:
        assert isinstance(video, VideoReader)
        for frame in video:
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 2
    assert len(alive) == 30


def test_opencv_is_not_needed_to_import_the_module() -> None:
    assert "cv2" not in vars(video_files)

"""What the demo reads and where its results go."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
WRITABLE_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
WRITABLE_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4"}

Video = Path | int
"""A file, or the index of a camera."""


class CommandError(Exception):
    """The command cannot be carried out as given; its text is for the user."""


class FreeNames:
    """Gives names in a folder that no input and no other result has."""

    def __init__(self, folder: Path, inputs: Iterable[Path]) -> None:
        self._folder = folder
        self._taken = {_folded(path) for path in inputs}

    def take(self, stem: str, suffix: str) -> Path:
        """``<stem><suffix>`` in the folder, numbered where that is taken; it is then taken too."""
        path, number = self._folder / f"{stem}{suffix}", 1
        while _folded(path) in self._taken:
            number += 1
            path = self._folder / f"{stem}_{number}{suffix}"
        self._taken.add(_folded(path))
        return path


def find_inputs(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The pictures and videos that files, folders (not those inside them) and patterns name, each once.

    Returns:
        Files, in the order of the inputs and by name within one; a sentence for each input without any.
    """
    found: dict[str, Path] = {}
    problems = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file())
            problem = f"no pictures or videos in the folder {text}"
        elif path.exists() or not glob.has_magic(text):
            paths = [path] if path.exists() else []
            problem = f"no such file: {text}"
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
            paths = sorted(p for p in map(Path, names) if p.is_file())
            problem = f"no file matches {text}"
        if not paths:
            problems.append(problem)
        for file in paths:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), problems


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def names_a_file(output: Path) -> bool:
    """Whether ``--output`` means one picture or video instead of a folder."""
    return output.suffix.lower() in WRITABLE_PICTURES | WRITABLE_VIDEOS and not output.is_dir()


def check_single_output(output: Path, pictures: Sequence[Path], videos: Sequence[Video]) -> None:
    """Refuse an output file that does not fit the inputs.

    Raises:
        CommandError: if there are several inputs, the input is of the other kind, or it is the output itself.
    """
    kind, fitting = "picture", len(pictures)
    if output.suffix.lower() in WRITABLE_VIDEOS:
        kind, fitting = "video", len(videos)
    count = len(pictures) + len(videos)
    if count > 1:
        raise CommandError(f"--output {output} is one {kind}, but there are {count} inputs; name a folder")
    if fitting != 1:
        raise CommandError(f"--output {output} is a {kind}, the input is not; name another file, or a folder")
    for source in [*pictures, *videos]:
        if isinstance(source, Path) and _folded(source) == _folded(output):
            raise CommandError(f"--output {output} is the input itself, which is never overwritten")


def check_folder(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an output folder that is an input.

    Raises:
        CommandError: if it is one.
    """
    if any(Path(p).is_dir() and os.path.realpath(p) == os.path.realpath(output) for p in inputs):
        raise CommandError(f"--output must be another folder than the --input folder {output}")


def make_folder(folder: Path, output: Path) -> None:
    """Make the folder of the results and check that it can be written.

    Raises:
        CommandError: if not; names ``output``, what the user gave.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder --output {output}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise CommandError(f"cannot write into the folder --output {output}")


def output_paths(names: FreeNames, pictures: Sequence[Path], videos: Sequence[Video] = ()) -> dict[Video, Path]:
    """``<stem>.png`` for each picture, ``<stem>.mp4`` for each video, ``webcam.mp4`` for a camera."""
    outputs: dict[Video, Path] = {picture: names.take(picture.stem, ".png") for picture in pictures}
    for video in videos:
        outputs[video] = names.take(video.stem if isinstance(video, Path) else "webcam", ".mp4")
        while isinstance(video, int) and outputs[video].exists():  # no recording replaces another
            outputs[video] = names.take("webcam", ".mp4")
    return outputs


def _folded(path: Path) -> str:
    """Equal for paths that may be one file, as on file systems that ignore case."""
    return os.path.realpath(path).casefold()

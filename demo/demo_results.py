"""Where results go: files in a folder, one file, or a window."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from demo_inputs import FreeNames, Video, check_single_output, make_folder, names_a_file, output_paths
from demo_video import video_to_file, video_to_window

if TYPE_CHECKING:
    import numpy as np
    from demo_models import Segmenter
    from demo_window import Window
    from numpy.typing import NDArray


class Plan(NamedTuple):
    """The file of each input; and the names that are left in the folder, None where the output is one file."""

    output: Path
    paths: dict[Video, Path]
    names: FreeNames | None


def plan_files(output: Path, pictures: Sequence[Path], videos: Sequence[Video]) -> Plan:
    """Choose the names of the results and make the folder.

    Args:
        output: a folder, or the file for the only input.
        pictures: inputs.
        videos: more of them.

    Raises:
        CommandError: if the output does not fit the inputs or cannot be made.
    """
    if names_a_file(output):
        check_single_output(output, pictures, videos)
        make_folder(output.parent, output)
        return Plan(output, dict.fromkeys([*pictures, *videos], output), None)
    make_folder(output, output)
    names = FreeNames(output, [*pictures, *(video for video in videos if isinstance(video, Path))])
    return Plan(output, output_paths(names, pictures, videos), names)


class Results(Protocol):
    """Takes what was drawn."""

    def add_picture(self, path: Path, drawing: NDArray[np.uint8], summary: str) -> str:
        """Take the drawing (H, W, 3) of a picture; returns what to print behind the picture's name.

        Raises:
            OSError: if it cannot be written.
            WindowClosedError: if the user wants no more.
        """

    def add_video(self, video: Video) -> bool:
        """Segment a video; says whether all of it could be read. Raises as `video_to_file` and `video_to_window`."""

    def finish(self) -> str:
        """Complete the results, of which there is at least one; returns a sentence on where they are, or "".

        Raises:
            CommandError: if something cannot be written.
        """


class Files:
    """Results as files: one for each input, and contact sheets if there are several pictures in a folder."""

    def __init__(self, plan: Plan, segmenter: Segmenter) -> None:
        from demo_sheet import ContactSheet

        self._plan, self._segmenter = plan, segmenter
        heading = f"{segmenter.task.capitalize()} segmentation with the model {segmenter.name}"
        names = plan.names
        self._sheet = None if names is None else ContactSheet(heading, lambda: names.take("contact_sheet", ".png"))

    def add_picture(self, path: Path, drawing: NDArray[np.uint8], summary: str) -> str:
        """See `Results`."""
        from mask2former.checkpoint import write_atomically

        output = self._plan.paths[path]
        write_atomically(output, _encode(drawing, output.suffix.lower()))
        if self._sheet is not None:
            self._sheet.add(drawing, path.name, summary)
        return "" if output.stem == path.stem else f" -> {output.name}"

    def add_video(self, video: Video) -> bool:
        """See `Results`."""
        return video_to_file(self._segmenter, video, self._plan.paths[video])

    def finish(self) -> str:
        """See `Results`."""
        if self._sheet is None:
            return f"The result is {self._plan.output}"
        pages = self._sheet.close()
        more = f" and {len(pages) - 1} more pages" if len(pages) > 1 else ""
        together = f"; all of them together: {pages[0]}{more}" if pages else ""
        return f"Results are in {self._plan.output}{together}"


class Screen:
    """Results in a window: pictures until a key is pressed, videos as they run."""

    def __init__(self, window: Window, segmenter: Segmenter) -> None:
        self._window, self._segmenter = window, segmenter

    def add_picture(self, path: Path, drawing: NDArray[np.uint8], summary: str) -> str:
        """See `Results`."""
        self._window.show(drawing, f"{path.name}: {summary} (any key: next, q: end)")
        return ""

    def add_video(self, video: Video) -> bool:
        """See `Results`."""
        return video_to_window(self._segmenter, video, self._window)

    def finish(self) -> str:
        """See `Results`."""
        return ""


def _encode(pixels: NDArray[np.uint8], suffix: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": 95} if suffix in (".jpg", ".jpeg", ".webp") else {}
    Image.fromarray(pixels).save(buffer, format=Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()

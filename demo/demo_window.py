"""A window on the screen, by OpenCV."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, Protocol

from demo_inputs import CommandError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NAME = "Mask2Former"
_LARGEST = (1280, 800)  # width and height that a picture is shown at; the user can change the size
_STOP_KEYS = {27, ord("q"), ord("Q")}  # 27 is Esc
_VISIBLE = 4  # cv2.WND_PROP_VISIBLE
_RESIZABLE = 0  # cv2.WINDOW_NORMAL
_POLL_MS = 50


class WindowClosedError(Exception):
    """The user has closed the window."""


class Gui(Protocol):
    """Those of OpenCV's functions that the window needs, with OpenCV's names."""

    def namedWindow(self, name: str, flags: int, /) -> None: ...  # noqa: N802
    def resizeWindow(self, name: str, width: int, height: int, /) -> None: ...  # noqa: N802
    def setWindowTitle(self, name: str, title: str, /) -> None: ...  # noqa: N802
    def imshow(self, name: str, pixels: NDArray[np.uint8], /) -> None: ...
    def waitKey(self, milliseconds: int, /) -> int: ...  # noqa: N802
    def getWindowProperty(self, name: str, number: int, /) -> float: ...  # noqa: N802
    def destroyAllWindows(self) -> None: ...  # noqa: N802


class Window:
    """Shows pictures. Esc, q or closing the window end the program: they raise `WindowClosedError`.

    As a context manager it removes the window at the end.
    """

    def __init__(self, gui: Gui) -> None:
        """Open the window.

        Raises:
            CommandError: if the system does not let it.
        """
        import cv2

        self._gui = gui
        self._shape: tuple[int, ...] = ()
        try:
            gui.namedWindow(_NAME, _RESIZABLE)
        except cv2.error as error:
            reason = f"OpenCV cannot open a window ({error})"
            raise CommandError(f"{reason}; name a folder for the results: --output DIR") from error

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._gui.destroyAllWindows()

    def show(self, pixels: NDArray[np.uint8], title: str, wait_ms: int | None = None) -> None:
        """Show a picture.

        Args:
            pixels: (H, W, 3) uint8 RGB.
            title: of the window.
            wait_ms: how long to wait, at least 1; None: until a key is pressed.

        Raises:
            WindowClosedError: if the user wants no more.
        """
        if pixels.shape != self._shape:
            self._shape = pixels.shape
            height, width = pixels.shape[:2]
            scale = min(1.0, _LARGEST[0] / width, _LARGEST[1] / height)
            self._gui.resizeWindow(_NAME, max(1, round(width * scale)), max(1, round(height * scale)))
        self._gui.imshow(_NAME, pixels[..., ::-1])
        self._gui.setWindowTitle(_NAME, title)
        while True:
            key = self._gui.waitKey(_POLL_MS if wait_ms is None else wait_ms)
            if (key != -1 and key & 0xFF in _STOP_KEYS) or self._gui.getWindowProperty(_NAME, _VISIBLE) < 1:
                raise WindowClosedError
            if wait_ms is not None or key != -1:
                return


def system_gui() -> Any:
    """OpenCV, if it can open windows here; see `Gui`.

    Raises:
        CommandError: if there is no display, or this OpenCV was built without windows.
    """
    import cv2

    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise CommandError("there is no display to show results on; name a folder for them: --output DIR")
    if re.search(r"^\s*GUI:\s*NONE\s*$", cv2.getBuildInformation(), re.M):
        raise CommandError(
            "name a folder for the results (--output DIR): the OpenCV that is installed, as opencv-python-headless, "
            "opens no windows. The package opencv-python does, in its place: "
            "pip uninstall opencv-python-headless, then pip install opencv-python"
        )
    return cv2

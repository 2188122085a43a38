"""Files that appear together when all of them are complete."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(paths: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder beside some files to write; those that were written to it under their names replace them.

    If the block fails or is interrupted the files are as before, and nothing is left of the folder.

    Args:
        paths: in one folder, in the order in which they are to appear.

    Raises:
        OSError: if the folder does not exist or cannot be written to.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{paths[0].name}.", suffix=".tmp", dir=paths[0].parent))
    try:
        yield folder
        for path in paths:
            (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""What is to be done for a data set, and the look at an image that all kinds share."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mask2former.data.catalog import Category
from mask2former.data.images import read_image
from mask2former.own_data.findings import Finding, ImageScan, fault
from mask2former.own_data.json_document import JsonDocument, Place

Job = Callable[[], ImageScan]


@dataclass(kw_only=True)
class Plan:
    """Of one data set.

    Attributes:
        findings: about the data set as a whole.
        categories: by contiguous id; empty if they cannot be read.
        jobs: one for each image, to be called in any process.
        second_looks: further jobs, of whose results only the findings are new.
        documents: the JSON files that findings are about.
    """

    findings: list[Finding] = field(default_factory=list)
    categories: tuple[Category, ...] = ()
    jobs: Sequence[Job] = ()
    second_looks: Sequence[Job] = ()
    documents: dict[str, JsonDocument] = field(default_factory=dict)


def scan_image(file: str, listed_in: str | None = None, place: Place | None = None) -> ImageScan:
    """Reads an image completely.

    Args:
        file: of the image.
        listed_in: file that names it, which a missing image is a fault of.
        place: in that file.
    """
    scan = ImageScan(file=file)
    try:
        pixels = read_image(file)
    except FileNotFoundError:
        scan.findings.append(fault("missing-image", listed_in or file, f"there is no image {file}", place))
        return scan
    except ValueError as error:
        scan.findings.append(fault("unreadable-image", file, str(error)))
        return scan
    scan.size = (pixels.shape[0], pixels.shape[1])
    scan.digest = digest_of(pixels)
    return scan


def digest_of(pixels: NDArray[np.uint8]) -> str:
    """The same for the same pixels, whatever the file's name and compression."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=12)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def size_text(size: Sequence[int]) -> str:
    """(48, 64) -> "48x64"."""
    return f"{size[0]}x{size[1]}"


def files_below(folder: Path, suffixes: frozenset[str] | set[str]) -> list[Path]:
    """All files with these suffixes in the folder and its subfolders, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)

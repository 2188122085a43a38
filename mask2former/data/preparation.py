"""The run of a script `datasets/prepare_*.py`: command line, several processes, progress, faults.

A script has one function that prepares a split. It lists jobs and gives them to `Preparation.convert` with a
function that turns one job into a `Converted` and writes nothing itself. What is wrong with the files is raised as
`PreparationError`, by either function; a run goes on after it and ends with exit code 1.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_masks
from tqdm import tqdm

from mask2former.data import prepared_files
from mask2former.data.catalog import Category
from mask2former.data.layouts import ROOT_VARIABLE, datasets_root
from mask2former.data.prepared_files import PreparationError

MOST_FAULTS = 50
"""A run stops when it has found so many."""

_FILES_AT_ONCE = 4
_MOST_WORKERS = 32  # of those that nobody asked for
_INTERRUPTED = 130

Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What becomes of one job; nothing is written yet.

    Attributes:
        images: output file -> pixels, (H, W) uint8 or uint16, or (H, W, 3) uint8; the suffix is the format.
        links: output file -> a file with the content that it shall have.
        row: what the split's function gets back, for a JSON file of all jobs.
    """

    images: Mapping[Path, NDArray[Any]] = field(default_factory=dict)
    links: Mapping[Path, Path] = field(default_factory=dict)
    row: Any = None


class Preparation:
    """One run: its settings, and what has been done and found.

    Attributes:
        root: folder that holds the data sets.
    """

    def __init__(self, *, root: Path, workers: int, overwrite: bool) -> None:
        """
        Args:
            root: folder that holds the data sets.
            workers: number of processes; with 1 everything is done in this one.
            overwrite: replace output files that are there with different content.
        """
        self.root = root
        self._pool = _pool(workers) if workers > 1 else None
        self._overwrite = overwrite
        self._faults = 0
        self._split_faults = 0
        self._written = 0
        self._kept = 0

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes when they have finished the files at hand."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def prepare(self, split: str, prepare: Callable[["Preparation", str], None]) -> None:
        """Calls the function for a split and keeps the fault that it raises."""
        self._split_faults = 0
        try:
            prepare(self, split)
        except PreparationError as fault:
            self.add_fault(str(fault))

    def partners(self, *kinds: tuple[Path, str]) -> list[tuple[Path, ...]]:
        """Files of the same name but for the suffix, in the order of the names.

        Args:
            kinds: folder and suffix of the files of one kind; the suffix may have more than the part after the dot.

        Returns:
            a tuple of files, one of each kind, for each name that all kinds have; a name that only some have is
            a fault.

        Raises:
            PreparationError: a folder is missing or has no such file.
        """
        found = [_stems(folder, suffix) for folder, suffix in kinds]
        complete = set(found[0]).intersection(*found[1:])
        for stem in sorted(set().union(*found) - complete):
            here = next(has[stem] for has in found if stem in has)
            lacking = [kind for kind, has in zip(kinds, found, strict=True) if stem not in has]
            missing = lacking[0][0] / (stem + lacking[0][1])
            self.add_fault(f"{missing}: is missing, but there is {here}")
        return [tuple(has[stem] for has in found) for stem in sorted(complete)]

    def convert(self, convert: Callable[[Job], Converted], jobs: Sequence[Job], title: str) -> list[Any]:
        """Converts all jobs and writes what comes out, with a progress bar.

        Args:
            convert: a function at the top of a module (or a functools.partial of one), which raises
                `PreparationError` when something is wrong with a file.
            jobs: anything that can go to another process.
            title: of the progress bar.

        Returns:
            the rows of the jobs without a fault, in the order of the jobs.
        """
        rows = []
        attempt = partial(_attempt, convert, self._overwrite)
        outcomes = map(attempt, jobs) if self._pool is None else _map_uninterrupted(self._pool, attempt, jobs)
        for outcome in tqdm(outcomes, total=len(jobs), desc=title, unit="file"):
            self._written += outcome.written
            self._kept += outcome.kept
            if outcome.fault is not None:
                self.add_fault(outcome.fault)
            else:
                rows.append(outcome.row)
        return rows

    def write_json(self, path: Path, content: Any) -> None:
        """Writes a split's JSON file, unless the split has faults.

        Raises:
            PreparationError: one with other content is there and must not be replaced.
        """
        if self._split_faults:
            print(f"{path} is not written because of these faults", file=sys.stderr)
        elif prepared_files.put_json(path, content, overwrite=self._overwrite):
            self._written += 1
        else:
            self._kept += 1

    def add_fault(self, text: str) -> None:
        """Shows a fault and counts it.

        Raises:
            TooManyFaultsError: it is the last that a run may have.
        """
        self._faults += 1
        self._split_faults += 1
        tqdm.write(f"fault: {text}", file=sys.stderr)
        if self._faults >= MOST_FAULTS:
            raise TooManyFaultsError

    def finish(self) -> int:
        """Says what has been done; returns the exit code."""
        print(f"{self._written} files written, {self._kept} were there already, {self._faults} faults")
        return 1 if self._faults else 0


class TooManyFaultsError(Exception):
    """There are so many faults that a run had better stop."""


def run(
    description: str | None,
    prepare: Callable[[Preparation, str], None],
    *,
    splits: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a script.

    Args:
        description: shown by --help: the script's docstring.
        prepare: prepares one split.
        splits: all splits.
        arguments: of the command line; None takes the program's.

    Returns:
        the exit code: 0 all is there; 1 there were faults; 130 interrupted.
    """
    args = _parse(description, splits, arguments)
    with Preparation(root=args.root, workers=args.workers, overwrite=args.overwrite) as preparation:
        try:
            for split in args.split:
                preparation.prepare(split, prepare)
        except TooManyFaultsError:
            print(f"stopped after {MOST_FAULTS} faults; what has been written is complete", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted; what has been written is complete, and the same command goes on", file=sys.stderr)
            return _INTERRUPTED
        except BrokenProcessPool:
            preparation.finish()
            print("a worker process was killed, perhaps for want of memory: try fewer --workers", file=sys.stderr)
            return 1
        return preparation.finish()


def category_rows(categories: Iterable[Category]) -> list[dict[str, Any]]:
    """The "categories" of a COCO JSON file."""
    return [
        {"id": category.id, "name": category.name, "isthing": int(category.is_thing), "color": list(category.color)}
        for category in categories
    ]


def segment_box(mask: NDArray[np.bool_]) -> list[int]:
    """[x, y, width, height] of the True pixels of (H, W); there must be one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def instance_annotation(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The part of a COCO annotation that follows from (H, W): segmentation (compressed RLE), area, bbox."""
    rle = coco_masks.encode(np.asfortranarray(mask.view(np.uint8)))
    segmentation = {"size": [int(size) for size in rle["size"]], "counts": rle["counts"].decode("ascii")}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": segment_box(mask)}


class _Outcome(NamedTuple):
    row: Any = None
    written: int = 0
    kept: int = 0
    fault: str | None = None


def _attempt(convert: Callable[[Job], Converted], overwrite: bool, job: Job) -> _Outcome:
    """Converts and writes; what it returns can go to another process."""
    written = []
    try:
        converted = convert(job)
        for path, pixels in converted.images.items():
            written.append(prepared_files.put_image(path, pixels, overwrite=overwrite))
        for path, source in converted.links.items():
            written.append(prepared_files.put_link(path, source, overwrite=overwrite))
    except PreparationError as fault:
        return _Outcome(written=sum(written), kept=written.count(False), fault=str(fault))
    return _Outcome(converted.row, written=sum(written), kept=written.count(False))


def _stems(folder: Path, suffix: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise PreparationError(f"{folder}: there is no such folder; datasets/README.md shows the expected folders")
    found = {path.name.removesuffix(suffix): path for path in folder.iterdir() if path.name.endswith(suffix)}
    if not found:
        raise PreparationError(f"{folder}: has no file *{suffix}")
    return found


def _pool(workers: int) -> ProcessPoolExecutor:
    """Unlike "fork", both ways of starting are safe beside the threads of NumPy and tqdm."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _ignore_interrupts)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all
    return ProcessPoolExecutor(workers, context, _ignore_interrupts)


def _map_uninterrupted(
    pool: ProcessPoolExecutor, attempt: Callable[[Job], _Outcome], jobs: Iterable[Job]
) -> Iterable[_Outcome]:
    """Ctrl-C goes to all processes of a terminal. It is for this one alone: the others finish the file at hand.

    A process inherits that it ignores the signal, so that it does from its first moment.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.map(attempt, jobs, chunksize=_FILES_AT_ONCE)
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse(description: str | None, splits: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=datasets_root(),
        metavar="FOLDER",
        help=f"folder that holds the data sets; without it ${ROOT_VARIABLE}, else ./datasets (now: %(default)s)",
    )
    parser.add_argument("--split", nargs="+", choices=splits, default=list(splits), help="without it all")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=min(os.cpu_count() or 1, _MOST_WORKERS),
        metavar="N",
        help="processes (now: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there with different content")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

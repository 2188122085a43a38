"""Results of an evaluation as tables, as files and as flat numbers for a log."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

# Results of parts of the categories, by the end of their names.
_PARTS = {"": "all", "_th": "things", "_st": "stuff"}


class Savable(Protocol):
    """What writes files of its own."""

    def save(self, folder: Path) -> None: ...


def report(
    name: str, results: Mapping[str, Mapping[str, float]], folder: Path | None = None, parts: Iterable[Savable] = ()
) -> None:
    """Logs the results of a data set as tables, without single classes, and writes everything into files.

    A file that cannot be written is no reason to lose a training: it is a warning.

    Args:
        name: of the data set.
        results: numbers by task, then by metric; with "-" in its name a metric is about a single class.
        folder: where results.json and results.txt are written; None: nowhere.
        parts: write into the folder too.
    """
    logger.info("Results of %s\n%s", name, summary_tables(results))
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            part.save(folder)
        write_whole(folder / "results.json", json.dumps(_plain(results), indent=1))
        write_whole(folder / "results.txt", f"{name}\n\n{summary_tables(results)}\n{class_tables(results)}")
    except OSError as error:
        logger.warning("The results cannot be written into %s: %s", folder, error)


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"segm": {"AP": 1.0}} -> {"segm/AP": 1.0}."""
    numbers: dict[str, float] = {}
    for name, value in results.items():
        numbers.update(flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return numbers


def main_metric(results: Mapping[str, Any]) -> tuple[str, float] | None:
    """The number by which checkpoints are compared: PQ, else mask AP, else mIoU, of the first data set."""
    numbers = flat(results)
    for wanted in ("panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU", "sem_seg/IoU"):
        for name, value in numbers.items():
            if f"/{name}".endswith(f"/{wanted}") and not math.isnan(value):
                return name, value
    return None


def summary_tables(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table for each task: a row of metrics, or one each for all categories, things and stuff."""
    tables = []
    for task, values in results.items():
        kept = {name: value for name, value in values.items() if "-" not in name}
        has_parts = any(name.endswith(end) for name in kept for end in _PARTS if end)
        rows = _PARTS if has_parts else {"": ""}
        columns = [name for name in kept if not (has_parts and name.endswith(tuple(e for e in _PARTS if e)))]
        cells = [[label, *(_text(kept[f"{name}{end}"]) for name in columns)] for end, label in rows.items()]
        tables.append(table([task, *columns], cells))
    return "\n".join(tables)


def class_tables(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table for each task that has results of single classes: a row a class."""
    tables = []
    for task, values in results.items():
        by_class: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            metric, dash, label = name.partition("-")
            if dash:
                by_class.setdefault(label, {})[metric] = value
        columns = list(dict.fromkeys(metric for found in by_class.values() for metric in found))
        cells = [[label, *(_text(row[c]) if c in row else "" for c in columns)] for label, row in by_class.items()]
        if cells:
            tables.append(table([task, *columns], cells))
    return "\n".join(tables)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * w for w in widths], *rows)
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _text(value: float) -> str:
    return f"{value:.2f}"


def _plain(value: Any) -> Any:
    """Nan is none in JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if math.isnan(value) else value


def write_whole(path: Path, text: str) -> None:
    """Writes a file, which is then complete, or as it was before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

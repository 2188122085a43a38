"""The result of a check, for people and as JSON."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from mask2former.own_data.check import CheckedSet, class_counts
from mask2former.own_data.findings import LEVELS, Finding

_SHOWN = 10
_KINDS = {
    "panoptic": "COCO panoptic annotations",
    "instance": "COCO instance annotations",
    "object_masks": "folders of masks",
    "semantic": "label maps",
}


def report_lines(sets: Sequence[CheckedSet], together: Sequence[Finding]) -> Iterator[str]:
    """The readable report.

    Args:
        sets: one, or training and validation data.
        together: findings about both.
    """
    for part in sets:
        yield f"== {part.name}: {_KINDS[part.source.kind]}"
        yield from _numbers(part)
        yield from _histogram(part)
        yield from finding_lines(part.findings)
        yield ""
    if together:
        yield f"== {' and '.join(part.name for part in sets)}"
        yield from finding_lines(together)
        yield ""
    every = [*together, *(finding for part in sets for finding in part.findings)]
    counts = [f"{sum(f.level == level for f in every)} {level}s" for level in LEVELS]
    yield f"{', '.join(counts)}"


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """By level and code, the first ones of each in full."""
    for level in LEVELS:
        codes = dict.fromkeys(finding.code for finding in findings if finding.level == level)
        for code in codes:
            same = [finding for finding in findings if (finding.level, finding.code) == (level, code)]
            yield f"{level} {code} ({len(same)})"
            yield from (f"    {finding.where()}: {finding.message}" for finding in same[:_SHOWN])
            if len(same) > _SHOWN:
                yield f"    ... and {len(same) - _SHOWN} more; --json FILE has them all"


def report_dict(sets: Sequence[CheckedSet], together: Sequence[Finding]) -> dict[str, Any]:
    """All findings and counts as plain values."""
    return {
        "sets": [
            {
                "name": part.name,
                "source": part.source.to_mapping(),
                "images": len(part.scans),
                "classes": _class_rows(part),
                "findings": [_plain(finding) for finding in part.findings],
            }
            for part in sets
        ],
        "together": [_plain(finding) for finding in together],
    }


def _numbers(part: CheckedSet) -> Iterator[str]:
    sizes = [scan.size for scan in part.scans if scan.size is not None]
    objects = sorted(len(scan.objects) for scan in part.scans)
    if not sizes:
        return
    low, high = min(sizes), max(sizes)
    text = f"{low[0]}x{low[1]}" if low == high else f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"
    yield f"{len(part.scans)} images of {text} pixels (height x width), {len(part.categories)} classes"
    what = "classes" if part.source.kind == "semantic" else "objects"
    yield f"{what} an image: {objects[0]} to {objects[-1]}, median {median(objects):g}"
    unlabelled, pixels = sum(scan.unlabelled for scan in part.scans), sum(h * w for h, w in sizes)
    if part.source.kind in ("panoptic", "semantic"):
        ignored = "void" if part.source.kind == "panoptic" else f"label {part.source.ignore_label}"
        yield f"unlabelled ({ignored}): {100 * unlabelled / pixels:.2f} % of the pixels"


def _histogram(part: CheckedSet) -> Iterator[str]:
    rows = _class_rows(part)
    if not rows:
        return
    width = max(5, *(len(row["name"]) for row in rows))
    pixels = sum(row["pixels"] for row in rows) or 1
    yield f"{'id':>4} {'class':{width}} {'objects':>9} {'images':>7} {'pixels':>8}"
    for row in rows:
        share = f"{100 * row['pixels'] / pixels:.2f} %"
        yield f"{row['label']:4} {row['name']:{width}} {row['objects']:9} {row['images']:7} {share:>8}"


def _class_rows(part: CheckedSet) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "id": category.id,
            "name": category.name,
            "is_thing": category.is_thing,
            "objects": count.objects,
            "images": count.images,
            "pixels": count.pixels,
        }
        for label, (category, count) in enumerate(zip(part.categories, class_counts(part), strict=True))
    ]


def _plain(finding: Finding) -> dict[str, Any]:
    line, column = finding.position or (None, None)
    return {
        "level": finding.level,
        "code": finding.code,
        "file": finding.file,
        "line": line,
        "column": column,
        "message": finding.message,
    }

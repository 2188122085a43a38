"""Looks at every file of one or two data sets and says what is wrong with them."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from mask2former.data.catalog import Category
from mask2former.own_data.checks import instances, object_masks, panoptic, semantic
from mask2former.own_data.checks.plan import Job, Plan
from mask2former.own_data.findings import Finding, ImageScan, fault, warning
from mask2former.own_data.source import Source, located

_PATHS = ("panoptic_json", "panoptic_png", "coco_json", "object_masks", "semantic_masks", "images")
_FEW = 64  # images for which starting processes would take longer than they save


@dataclass(kw_only=True)
class CheckedSet:
    """A data set after the check.

    Attributes:
        name: for people.
        source: its files.
        categories: by contiguous id; empty if they could not be read.
        findings: faults, warnings and notes, with their lines.
        images: number of images, whether they were looked at or not.
        scans: one for each image that was looked at.
    """

    name: str
    source: Source
    categories: tuple[Category, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    scans: list[ImageScan] = field(default_factory=list)
    images: int = 0

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "fault"]


class ClassCount:
    """How often a class occurs: objects, images, pixels."""

    def __init__(self) -> None:
        self.objects = 0
        self.images = 0
        self.pixels = 0


def class_counts(checked: CheckedSet) -> list[ClassCount]:
    """By contiguous id."""
    counts = [ClassCount() for _ in checked.categories]
    for scan in checked.scans:
        seen = set()
        for size in scan.objects:
            if size.category < len(counts):
                counts[size.category].objects += 1
                counts[size.category].pixels += size.pixels
                seen.add(size.category)
        for category in seen:
            counts[category].images += 1
    return counts


def check(
    source: Source,
    name: str = "data",
    *,
    forbids_overlaps: bool = False,
    processes: int | None = None,
    at_most: int | None = None,
) -> CheckedSet:
    """Check one data set.

    Args:
        source: its files.
        name: for people.
        forbids_overlaps: masks of objects must not share pixels.
        processes: that look at images; None: one for each processor; 1: this one.
        at_most: looks at so many images, evenly spread; None: all.
    """
    checked = CheckedSet(name=name, source=source)
    for part in _PATHS:
        text = getattr(source, part)
        if text is not None and not located(text).exists():
            checked.findings.append(fault("missing-path", located(text), "there is no such file or folder"))
    if checked.findings:
        return checked
    plan = _plan(source, forbids_overlaps)
    checked.categories, checked.images = plan.categories, len(plan.jobs)
    jobs = plan.jobs if at_most is None else _spread(plan.jobs, at_most)
    checked.scans = list(_run(jobs, name, processes))
    found = [*plan.findings, *(finding for scan in checked.scans for finding in scan.findings)]
    if at_most is None:
        second = _run(plan.second_looks, f"{name}, instances", processes)
        found += [finding for scan in second for finding in scan.findings]
        found += [*_class_findings(checked), *_repeated_images(checked)]
    checked.findings = [finding.located(plan.documents) for finding in found]
    return checked


def compare(train: CheckedSet, val: CheckedSet) -> list[Finding]:
    """What is wrong with two sets together: other classes, and images that are in both."""
    found = compare_classes([train, val])
    known = {scan.digest: scan.file for scan in train.scans if scan.digest is not None}
    for scan in val.scans:
        if scan.digest in known:
            message = f"this image is also in {train.name}, as {known[scan.digest]}"
            found.append(warning("image-in-both-sets", scan.file, message))
    return found


def compare_classes(sets: Sequence[CheckedSet]) -> list[Finding]:
    """A fault if sets have other classes than the first, or in another order."""
    found = []
    classes = [[(c.name, c.is_thing) for c in part.categories] for part in sets]
    for part, its in zip(sets[1:], classes[1:], strict=True):
        if classes[0] and its and classes[0] != its:
            odd = sorted({name for name, _ in set(classes[0]) ^ set(its)}) or "their order"
            message = (
                f"the classes of {sets[0].name} and {part.name} must be the same in the same order, but {odd} differ"
            )
            found.append(fault("classes-differ", part.name, message))
    return found


def _plan(source: Source, forbids_overlaps: bool) -> Plan:
    if source.kind == "semantic":
        return semantic.examine(source)
    if source.kind == "object_masks":
        return object_masks.examine(source, forbids_overlaps=forbids_overlaps)
    if source.kind == "instance":
        return instances.examine(source, forbids_overlaps=forbids_overlaps)
    plan = panoptic.examine(source)
    if source.coco_json is not None:
        beside = instances.examine(
            Source(coco_json=source.coco_json, images=source.images), forbids_overlaps=forbids_overlaps
        )
        plan.findings += beside.findings
        plan.documents |= beside.documents
        plan.second_looks = beside.jobs
    return plan


def _run(jobs: Sequence[Job], name: str, processes: int | None) -> Iterator[ImageScan]:
    processes = processes or os.cpu_count() or 1
    progress = {"desc": f"checking {name}", "unit": "image", "leave": False, "disable": None}
    if processes == 1 or len(jobs) <= _FEW:
        yield from tqdm((job() for job in jobs), total=len(jobs), **progress)
        return
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from tqdm(pool.map(_call, jobs, chunksize=8), total=len(jobs), **progress)


def _call(job: Job) -> ImageScan:
    return job()


def _spread(jobs: Sequence[Job], at_most: int) -> Sequence[Job]:
    step = -(-len(jobs) // at_most) if jobs else 1
    return jobs[::step]


def _class_findings(checked: CheckedSet) -> Iterator[Finding]:
    """Classes that do not occur."""
    counts = class_counts(checked)
    where = next(text for part in _PATHS if (text := getattr(checked.source, part)) is not None)
    unused = [category.name for category, count in zip(checked.categories, counts, strict=True) if not count.objects]
    if unused:
        message = f"{len(unused)} of {len(counts)} classes do not occur: {', '.join(unused[:10])}"
        yield warning("unused-category", located(where), message + (", ..." if len(unused) > 10 else ""))
    yield from semantic.absent_background(checked.source, [count.pixels for count in counts])


def _repeated_images(checked: CheckedSet) -> Iterator[Finding]:
    digests = Counter(scan.digest for scan in checked.scans if scan.digest is not None)
    first: dict[str, str] = {}
    for scan in checked.scans:
        if scan.digest is None or digests[scan.digest] == 1:
            continue
        other = first.setdefault(scan.digest, scan.file)
        if other != scan.file:
            yield warning("same-image-twice", scan.file, f"this image is the same as {other}")

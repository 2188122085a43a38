"""Small changes to the files of small data sets."""

import json

import numpy as np
from PIL import Image

from tests.own_data.small import write_json, write_panoptic


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


def text_edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def annotation(root, **changes):
    edit(root / "instances.json", lambda content: content["annotations"][2].update(changes))


def cut(file, kept=300):
    file.write_bytes(file.read_bytes()[:kept])


def resave(file, change):
    Image.fromarray(change(np.array(Image.open(file)))).save(file)


def polygon(*points):
    return [[float(value) for value in points]]


def segment(root, **changes):
    edit(root / "panoptic.json", lambda c: c["annotations"][1]["segments_info"][0].update(changes))


def paint(root, number):
    ids = np.array(Image.open(root / "png/b.png")).astype(int) @ [1, 256, 65536]
    ids[0, :5] = number
    write_panoptic(root / "png/b.png", ids)


def replaced(content, place, value):
    """The content with another value at a place."""
    if not place:
        return value
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return content


def parts_of(value, place=()):
    """(place, value) of a document and all its parts."""
    yield place, value
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield from parts_of(part, (*place, step))


def levels(checked, level="fault"):
    """The codes of the findings of a level."""
    return [finding.code for finding in checked.findings if finding.level == level]

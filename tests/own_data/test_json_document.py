"""JSON whose parts know their line."""

import json
import random

import pytest

from mask2former.own_data.json_document import DamagedJsonError, JsonDocument
from tests.own_data.changes import parts_of


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_position_is_where_the_part_begins(indent, seed, tmp_path):
    rng = random.Random(seed)

    def make(depth):
        kind = rng.choice(["list", "dict", "leaf"] if depth else ["dict"])
        if depth == 4 or kind == "leaf":
            return rng.choice([1, -2.5e3, True, None, 'a,]}"{[:\n', "ü", "", [], {}])
        if kind == "list":
            return [make(depth + 1) for _ in range(rng.randrange(4))]
        return {f"k\n{n}ü": make(depth + 1) for n in range(rng.randrange(1, 5))}

    content = make(0)
    file = tmp_path / "x.json"
    file.write_text("\n " + json.dumps(content, indent=indent, ensure_ascii=bool(seed % 2)), encoding="utf-8")
    document, lines = JsonDocument(file), file.read_text("utf-8").split("\n")
    for place, value in parts_of(content):
        line, column = document.position(place)
        rest = "\n".join([lines[line - 1][column - 1 :], *lines[line:]])
        assert json.JSONDecoder().raw_decode(rest)[0] == value


def test_a_part_that_does_not_exist_is_where_it_should_be(tmp_path):
    (tmp_path / "x.json").write_text('{"a":\n [1,\n  {"b": 2}]}')
    document = JsonDocument(tmp_path / "x.json")
    assert document.position(("a", 1, "c", "d")) == (3, 3)
    assert document.position(("z",)) == (1, 1)


@pytest.mark.parametrize(
    ("raw", "position"),
    [(b'{"a": 1,\n "b" 2}', (2, 6)), (b"", (1, 1)), (b'{"a":\n "\xff"}', (2, 3)), (b'{"a": [1, 2\n', (2, 1))],
)
def test_damaged_files_say_where(raw, position, tmp_path):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(DamagedJsonError) as caught:
        JsonDocument(tmp_path / "x.json")
    assert caught.value.position == position

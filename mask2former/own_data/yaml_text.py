"""Writes YAML that both engines read, without a YAML library, which the core does not need."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/|~/)[\w./~-]*(?: [\w./~-]+)*")
_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "~"}


class Noted(NamedTuple):
    """A value with a comment behind it."""

    value: Any
    comment: str


def yaml_lines(tree: Mapping[str, Any], indent: int = 0) -> list[str]:
    """Nested mappings in block form; lists on one line, but lists of mappings one below the other."""
    lines = []
    for key, value in tree.items():
        start = f"{' ' * indent}{key}:"
        if isinstance(value, Noted):
            lines.append(f"{start} {scalar(value.value)}  # {value.comment}")
        elif isinstance(value, Mapping):
            lines += [start, *yaml_lines(value, indent + 2)]
        elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            lines.append(start)
            for item in value:
                lines += list_item(item, indent + 2)
        else:
            lines.append(f"{start} {scalar(value)}")
    return lines


def list_item(item: Mapping[str, Any], indent: int) -> list[str]:
    """A mapping as an item of a list, whose dash stands at `indent`."""
    lines = yaml_lines(item, indent + 2)
    return [f"{' ' * indent}- {lines[0].lstrip()}", *lines[1:]]


def scalar(value: Any) -> str:
    """A number, truth value, text, or list of them, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(scalar(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")  # 1e-05 would be a text
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def add_custom_datasets(text: str, rows: Sequence[Mapping[str, Any]], file: Path) -> str:
    """The text of a config with further items in its DATASETS.CUSTOM, everything else as it was.

    Args:
        text: of the config.
        rows: the items.
        file: named in errors.

    Raises:
        ValueError: the list or its section is not in block form, or has an item of that name.
    """
    for row in rows:
        if re.search(rf"^\s*-?\s*NAME:\s*[\"']?{re.escape(row['NAME'])}[\"']?\s*(#.*)?$", text, re.M):
            raise ValueError(f"{file} has a data set of the NAME {row['NAME']} already")
    lines = text.splitlines()
    section = _find(lines, r"DATASETS:\s*(#.*)?", 0, len(lines))
    if section is None:
        if _find(lines, r"DATASETS:.*", 0, len(lines)) is not None:
            raise ValueError(
                f"{file}: DATASETS must be a section of indented lines to be added to; add the list by hand"
            )
        return "\n".join([*lines, *yaml_lines({"DATASETS": {"CUSTOM": list(rows)}})]) + "\n"
    end = _end_of_block(lines, section)
    indent = next((_indent(line) for line in lines[section + 1 : end] if line.strip()), 2)
    custom = _find(lines, rf" {{{indent}}}CUSTOM:\s*(#.*)?", section + 1, end)
    if custom is None:
        if _find(lines, rf" {{{indent}}}CUSTOM:.*", section + 1, end) is not None:
            raise ValueError(
                f"{file}: DATASETS.CUSTOM must have one item below the other to be added to; add it by hand"
            )
        new = yaml_lines({"CUSTOM": list(rows)}, indent)
        place = section + 1
    else:
        place = _end_of_block(lines, custom)
        dash = next((_indent(line) for line in lines[custom + 1 : place] if line.lstrip().startswith("-")), indent + 2)
        new = [line for row in rows for line in list_item(row, dash)]
    return "\n".join([*lines[:place], *new, *lines[place:]]) + "\n"


def _find(lines: Sequence[str], pattern: str, start: int, end: int) -> int | None:
    return next((n for n in range(start, end) if re.fullmatch(pattern, lines[n])), None)


def _end_of_block(lines: Sequence[str], head: int) -> int:
    """The line after the last one that belongs to the key in line `head`; items of a list may stand below its key."""
    end = head + 1
    for number in range(head + 1, len(lines)):
        line = lines[number]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        deeper = _indent(line) > _indent(lines[head])
        if not deeper and not (line.lstrip().startswith("- ") and _indent(line) == _indent(lines[head])):
            break
        end = number + 1
    return end


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())

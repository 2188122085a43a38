"""Names of classes, which key the results of single classes."""

from collections import Counter
from collections.abc import Sequence


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: if there is none, or one occurs twice.
    """
    names = tuple(class_names)
    if not names:
        raise ValueError("class_names must hold at least one name, got none")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"class_names must differ since they key the results, got {repeated} twice")
    return names


def distinct_names(class_names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """The names, each that occurs several times with the id of its category behind it."""
    count = Counter(class_names)
    return [name if count[name] == 1 else f"{name} ({i})" for name, i in zip(class_names, ids, strict=True)]

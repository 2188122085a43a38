"""Single keys of a config: read, and refused where their value is not known.

Keys are dotted. Errors are ValueErrors that name key, rule and value.
"""

from collections.abc import Collection
from typing import Any


def value_of(cfg: Any, key: str) -> Any:
    """The value of a key, with a tuple turned into a list."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return list(cfg) if isinstance(cfg, tuple) else cfg


def require(cfg: Any, key: str, supported: Any, where: str = "here") -> None:
    """Refuse all values but one."""
    value = value_of(cfg, key)
    if value != supported:
        raise ValueError(f"{key} must be {supported!r}, the only value supported {where}, got {value!r}")


def one_of(cfg: Any, key: str, known: Collection[Any]) -> Any:
    """The value of a key, one of those that are known."""
    value = value_of(cfg, key)
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(map(str, known))}, got {value!r}")
    return value


def subset_of(cfg: Any, key: str, known: Collection[str]) -> list[str]:
    """The value of a key, a list of some of those that are known."""
    values = list(value_of(cfg, key))
    if not values or not set(values) <= set(known):
        raise ValueError(f"{key} must be some of {', '.join(known)}, got {values!r}")
    return values


def at_least(cfg: Any, key: str, minimum: int) -> Any:
    """The value of a key that has a lower bound."""
    value = value_of(cfg, key)
    if value < minimum:
        raise ValueError(f"{key} must be at least {minimum}, got {value!r}")
    return value

"""Configs without Detectron2: the same YAML files, overrides and defaults, read into frozen nested attributes."""

import ast
import copy
import difflib
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from mask2former.config import DEFAULTS, custom_dataset_arguments
from mask2former.engine.defaults import DETECTRON2_DEFAULTS, ONLY_DEFAULT, is_ignored
from mask2former.engine.yaml_files import ConfigError, Tree, read_yaml
from mask2former.own_data import register_custom_datasets

__all__ = ["ALL_DEFAULTS", "Config", "ConfigError", "get_config"]

ALL_DEFAULTS: dict[str, Any] = {**DETECTRON2_DEFAULTS, **DEFAULTS}
_SECTIONS = {key[:place] for key in ALL_DEFAULTS for place, sign in enumerate(key) if sign == "."}


class Config:
    """A section of a config: keys and further sections are attributes, which cannot be set."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Set up.

        Args:
            values: by dotted key.
        """
        tree: Tree = {}
        for key, value in values.items():
            head, _, rest = key.partition(".")
            if rest:
                tree.setdefault(head, {})[rest] = value
            else:
                tree[head] = value
        for name, value in tree.items():
            self.__dict__[name] = Config(value) if isinstance(value, dict) else value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a config is frozen, so {name} cannot be set; pass it to get_config as an override")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.dump())

    def changed(self, values: dict[str, Any]) -> "Config":
        """A copy with other values of some keys, which are dotted."""
        return Config({**dict(self._items()), **values})

    def _items(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in vars(self).items():
            if isinstance(value, Config):
                yield from value._items(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def tree(self) -> Tree:
        """Nested dicts; tuples become lists."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def dump(self) -> str:
        """YAML that both engines read again."""
        return str(yaml.safe_dump(self.tree(), sort_keys=True))


def get_config(config_file: str | PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config, and register its DATASETS.CUSTOM.

    Args:
        config_file: YAML in Detectron2's form; None: defaults alone.
        overrides: key, value, key, value, ... as on a command line: ["SOLVER.IMS_PER_BATCH", "4"].

    Raises:
        ConfigError: if a file cannot be read, a key is unknown, a value has another type than its default, or a
            key asks for what this engine cannot do. The message names file, key, rule and value.
    """
    if len(overrides) % 2:
        raise ConfigError(f"overrides must be pairs of key and value, got {list(overrides)!r}")
    values = copy.deepcopy(ALL_DEFAULTS)
    if config_file is not None:
        path = Path(config_file)
        for key, value in _flatten(read_yaml(path), ""):
            _put(values, key, value, str(path))
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _put(values, key, value, "command line")
    for key, reason in ONLY_DEFAULT.items():
        if values[key] != ALL_DEFAULTS[key]:
            rule = f"must be {ALL_DEFAULTS[key]!r} with the embedded engine, got {values[key]!r}"
            raise ConfigError(f"{key} {rule}: {reason}")
    cfg = Config(values)
    try:
        register_custom_datasets(**custom_dataset_arguments(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return cfg


def _flatten(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key in _SECTIONS:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    if is_ignored(key):
        return
    if key in _SECTIONS:
        raise ConfigError(f"{where}: {key} is a section with keys of its own, got {value!r}")
    if key not in values:
        near = difflib.get_close_matches(key, values, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: there is no key {key}; the nearest is {near[0]}")
    values[key] = _converted(_decoded(value), ALL_DEFAULTS[key], key, where)


def _decoded(value: Any) -> Any:
    """A text that is a Python literal means that literal, in files too: "('a',)" or 1e-4."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _converted(value: Any, default: Any, key: str, where: str) -> Any:
    """The value with the type of its default, where that changes nothing; None stands for no value."""
    allowed = (bool, int, float, str, list, tuple, type(None))
    if isinstance(value, allowed) and (value is None or default is None or type(value) is type(default)):
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return type(default)(value)
    wanted = {"str": "a text", "int": "an integer", "float": "a number", "bool": "True or False"}
    rule = wanted.get(type(default).__name__, "a list")
    raise ConfigError(f"{where}: {key} must be {rule} like its default {default!r}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.tree()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

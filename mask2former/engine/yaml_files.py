"""Reads YAML configs in Detectron2's form: files that inherit from others by ``_BASE_``. No file can run code."""

from pathlib import Path
from typing import Any

import yaml

from mask2former.engine.expressions import ExpressionError, evaluate

Tree = dict[str, Any]

_BASE = "_BASE_"
_PYTHON = "tag:yaml.org,2002:python/"


class ConfigError(ValueError):
    """A config that cannot be used; the message is for the user and names file or key."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and the two tags of published and dumped configs."""


def _construct_expression(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(values) != 1 or not isinstance(values[0], str):
        raise ExpressionError(f"the tag eval must have a list of one text, got {values!r}")
    return evaluate(values[0])


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise ExpressionError("the tag tuple must have a list")
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor(f"{_PYTHON}object/apply:eval", _construct_expression)
_Loader.add_constructor(f"{_PYTHON}tuple", _construct_tuple)


def read_yaml(path: Path) -> Tree:
    """The nested dict of a file and of those that it inherits from; what is nearer to the file wins.

    ``_BASE_`` names one file, or a list of files of which a later one wins. Names are relative to the file
    that has them.

    Raises:
        ConfigError: if a file is missing, is no YAML dict, inherits from itself, or has a Python tag other than
            the expressions of `mask2former.engine.expressions`.
    """
    return _read(path.expanduser(), ())


def _read(path: Path, children: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in children:
        chain = " -> ".join(p.name for p in (*children[children.index(path) :], path))
        raise ConfigError(f"{path}: a file must not inherit from itself by {_BASE}, got {chain}")
    tree = _parse(path)
    bases = tree.pop(_BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: {_BASE} must be a file name or a list of them, got {bases!r}")
    merged: Tree = {}
    for base in bases:
        _merge(_read(path.parent / Path(base).expanduser(), (*children, path)), merged, path, "")
    _merge(tree, merged, path, "")
    return merged


def _parse(path: Path) -> Tree:
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error.strerror or error}") from error
    except ExpressionError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is no YAML that can be read safely: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config must be a YAML mapping of keys, got {type(content).__name__}")
    return content


def _merge(source: Tree, target: Tree, path: Path, prefix: str) -> None:
    """Put source over target, section by section."""
    for name, value in source.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: keys must be names, got {name!r} in {prefix or 'the file'}")
        old = target.get(name)
        if isinstance(value, dict) and name in target:
            if not isinstance(old, dict):
                raise ConfigError(f"{path}: {prefix}{name} must be a value as in the file's base, got a section")
            _merge(value, old, path, f"{prefix}{name}.")
        else:
            target[name] = value

"""What is exported: a model with its description, from a config and a checkpoint, or from a model file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from mask2former.build import build_model
from mask2former.checkpoint import ModelDescription, load_model_file
from mask2former.modeling.mask2former import Mask2Former


class Source(NamedTuple):
    """A model of the core in evaluation mode, on the CPU, and its description."""

    network: Mask2Former
    description: ModelDescription


def from_config(config_file: str, weights: str, opts: Sequence[str], notes: Mapping[str, str]) -> Source:
    """Build the model of a config with the engine that is there, load a checkpoint and make it one of the core.

    Args:
        config_file: YAML file.
        weights: of the whole model.
        opts: overrides of the config, names and values in turn.
        notes: for the description.

    Raises:
        ValueError: if the config cannot be used, or the weights do not fit.
        OSError: if a file cannot be read.
    """
    configured_model: Any
    if find_spec("detectron2") is None:
        from mask2former.engine.predictor import configured_model
    else:
        from mask2former.d2.predictor import configured_model

    cfg = read_config(config_file, [*opts, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"])
    configured = configured_model(cfg)
    description = configured.describe(notes)
    with torch.random.fork_rng(devices=[]):
        network = build_model(description.architecture)
    network.load_state_dict(configured.model.state_dict())
    return Source(network.eval(), description)


def read_config(config_file: str, opts: Sequence[str] = ()) -> Any:
    """Read a config with the engine that is there, which registers its DATASETS.CUSTOM.

    Args:
        config_file: YAML file.
        opts: overrides, names and values in turn.

    Raises:
        ValueError: if the config cannot be used.
        OSError: if a file cannot be read.
    """
    get_config: Any
    if find_spec("detectron2") is None:
        from mask2former.engine.config import get_config
    else:
        from mask2former.d2 import get_config

    return get_config(config_file, list(opts))


def from_model(name: str, notes: Mapping[str, str]) -> Source:
    """Read a model file, or fetch a published model.

    Args:
        name: the file, or a name of `mask2former.zoo`.
        notes: added to those of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no model file.
        OSError: if a published model cannot be fetched.
    """
    from mask2former import zoo

    if zoo.is_model_name(name):
        published = zoo.find_model(name)
        source = Source(zoo.load_model(published).model, published.description())
    else:
        source = Source(*load_model_file(name))
    return source._replace(description=replace(source.description, notes={**source.description.notes, **notes}))

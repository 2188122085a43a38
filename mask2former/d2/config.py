"""The published keys in Detectron2's CfgNode."""

from collections.abc import Sequence
from copy import deepcopy
from os import PathLike, fspath

from detectron2.config import CfgNode, get_cfg

from mask2former.config import DEFAULTS
from mask2former.d2.data import register_datasets_of


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Set every key of `mask2former.config.DEFAULTS` to its default; call it before a file is merged.

    Args:
        cfg: as from `get_cfg()`, with or without `add_deeplab_config`; changed in place. Other keys stay as
            they are, also those that another project has added to the same section.
    """
    for key, default in DEFAULTS.items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            if section not in node:
                setattr(node, section, CfgNode())
            node = node[section]
        setattr(node, name, deepcopy(default))


def get_config(config_file: str | PathLike[str], overrides: Sequence[str] = ()) -> CfgNode:
    """A config as the published `train_net.py` sets it up, not frozen; its DATASETS.CUSTOM are registered.

    Args:
        config_file: YAML in Detectron2's form. As everywhere in Detectron2, tags that call Python are run,
            with a warning: load no file of unknown origin.
        overrides: key, value, key, value, ... as on a command line: ["SOLVER.IMS_PER_BATCH", "4"].

    Raises:
        ValueError: if a key in `overrides` has no value.
    """
    # Dumped configs of published models hold all of DeepLab's keys, which belong to no model here.
    from detectron2.projects.deeplab import add_deeplab_config

    if len(overrides) % 2:
        raise ValueError(f"overrides must be pairs of key and value, got {list(overrides)!r}")
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(fspath(config_file))
    cfg.merge_from_list(list(overrides))
    register_datasets_of(cfg)
    return cfg

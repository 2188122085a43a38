"""The published image models by name: fetched once, checked, and loaded into a predictor.

A name is ``<data>-<task>-<backbone>``: data is the folder of the config in ``configs/``, the backbone is r50, r101,
swin-tiny, swin-small, swin-base or swin-large, with ``-in21k`` where it was pre-trained on the large ImageNet. The
table is `published_models.json`; `MODELS` holds it, and ``python -m mask2former models`` prints it.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from mask2former.build import Architecture, build_model, preset
from mask2former.checkpoint import ModelDescription, PredictionSettings, Task, load_weights
from mask2former.data import Category, catalog
from mask2former.download import Download, DownloadError, cache_folder
from mask2former.predictor import Predictor

__all__ = [
    "MODELS",
    "DownloadError",
    "PublishedModel",
    "fetch",
    "find_model",
    "is_model_name",
    "load_model",
    "load_predictor",
]

URL_VARIABLE = "MASK2FORMER_MODEL_URL"
_TABLE = Path(__file__).with_name("published_models.json")


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A published checkpoint, and what it takes to use it.

    Attributes:
        name: see the module.
        data: what it was trained on, the first part of the name.
        task: that it was trained for.
        backbone: for people, such as "Swin-L (IN21k)".
        million_parameters: of the whole model; a file has four bytes for each.
        scores: as published, by the name of the metric; percentages on the validation set, the main one first.
        license: of the weights.
        config: the published config, below the project's ``configs/``.
        path: of the file, below the base address. Its name ends with the beginning of its SHA-256.
        dataset: name in `mask2former.data.catalog`.
        categories: of the K classes; those of the data set.
        architecture: what `build_model` takes.
        settings: how it predicts, as its config says; the task that it was trained for comes first.
    """

    name: str
    data: str
    task: Task
    backbone: str
    million_parameters: float
    scores: Mapping[str, float]
    license: str
    config: str
    path: str
    dataset: str
    categories: tuple[Category, ...]
    architecture: Architecture
    settings: PredictionSettings

    @property
    def url(self) -> str:
        """Where the file is: below $MASK2FORMER_MODEL_URL, else at its publishers'.

        Raises:
            ValueError: if the variable is no address.
        """
        base = os.environ.get(URL_VARIABLE) or str(_table()["base_url"])
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"{URL_VARIABLE} must begin with http:// or https://, got {base!r}")
        return f"{base.rstrip('/')}/{self.path}"

    @property
    def sha256_prefix(self) -> str:
        """The first hexadecimal digits of the file's SHA-256."""
        return Path(self.path).stem.rpartition("_")[2]

    @property
    def cached_file(self) -> Path:
        """Where the file is once it was fetched, or was put by hand."""
        return cache_folder() / Path(self.path).name

    def description(self) -> ModelDescription:
        """What `save_model_file` needs to store the model, with its file and licence as notes."""
        return ModelDescription(
            architecture=self.architecture,
            categories=self.categories,
            settings=self.settings,
            notes={"name": self.name, "file": self.path, "license": self.license},
        )


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(_TABLE.read_text(encoding="utf-8")))


def _published_model(row: dict[str, Any], group: dict[str, Any]) -> PublishedModel:
    categories = catalog.get(group["dataset"]).metadata.categories
    architecture = preset(row["preset"], num_classes=len(categories), num_queries=row.get("num_queries", 100))
    if "norm" in row:
        architecture["backbone"]["norm"] = row["norm"]
    settings = {**group["settings"], **row.get("settings", {})}
    return PublishedModel(
        **{key: group[key] for key in ("data", "task", "dataset")},
        **{key: row[key] for key in ("name", "backbone", "million_parameters", "scores", "config", "path")},
        license=_table()["license"],
        categories=categories,
        architecture=architecture,
        settings=PredictionSettings(**{**settings, "tasks": tuple(settings["tasks"])}),
    )


class _Models(Mapping[str, PublishedModel]):
    """The table, read when it is first asked for."""

    @cached_property
    def _by_name(self) -> dict[str, PublishedModel]:
        groups = _table()["groups"]
        return {row["name"]: _published_model(row, group) for group in groups for row in group["models"]}

    def __getitem__(self, name: str) -> PublishedModel:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


MODELS: Mapping[str, PublishedModel] = _Models()
"""All published image models by name, in the order of the paper's data sets."""


def is_model_name(text: str) -> bool:
    """Whether a text names a published model."""
    return text in MODELS


def find_model(name: str, models: Mapping[str, PublishedModel] = MODELS) -> PublishedModel:
    """The model of a name.

    Raises:
        ValueError: if there is none; the message has similar names.
    """
    if name not in models:
        near = difflib.get_close_matches(name, models, n=4, cutoff=0.4)
        hint = f"similar names: {', '.join(near)}" if near else "python -m mask2former models lists all"
        raise ValueError(f"no published model has the name {name!r}; {hint}")
    return models[name]


def fetch(model: PublishedModel) -> Path:
    """The file of a model, downloaded unless it is in the cache folder; its hash is checked in any case.

    Raises:
        DownloadError: see `Download.fetch`.
        ValueError: if MASK2FORMER_MODEL_URL is no address.
    """
    return Download(url=model.url, path=model.cached_file, sha256_prefix=model.sha256_prefix).fetch()


def load_model(model: PublishedModel, device: str | torch.device = "cpu", **overrides: Any) -> Predictor:
    """Fetch a model and put it into a predictor; each tensor must fit.

    Args:
        model: an entry of `MODELS`, or one like these.
        device: where to compute.
        **overrides: of its `PredictionSettings`, and other arguments of `Predictor`.

    Raises:
        DownloadError: if the file cannot be had.
        ValueError: if its weights do not fit, or a value is out of its range.
        TypeError: if there is no such setting.
    """
    path = fetch(model)
    with torch.random.fork_rng(devices=[]):  # no trace in the caller's random numbers
        network = build_model(model.architecture)
    load_weights(network, path)
    description = model.description()
    return Predictor(
        network,
        categories=description.categories,
        image_format=description.image_format,
        device=device,
        **{**vars(description.settings), **overrides},
    )


def load_predictor(name: str, device: str | torch.device = "cpu", **overrides: Any) -> Predictor:
    """`load_model` of a name.

    Raises:
        ValueError: if there is no such name, too.
    """
    return load_model(find_model(name), device, **overrides)

"""A ready config for a data set."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mask2former.own_data import choices
from mask2former.own_data.check import CheckedSet
from mask2former.own_data.recipes import RECIPES, REFERENCE_BATCH, Recipe
from mask2former.own_data.source import Kind, Source
from mask2former.own_data.yaml_text import Noted, yaml_lines

_CHECKOUT = Path(__file__).resolve().parents[2]
_MAPPERS: dict[Kind, str] = {
    "panoptic": "mask_former_panoptic",
    "instance": "mask_former_instance",
    "object_masks": "mask_former_instance",
    "semantic": "mask_former_semantic",
}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user decides.

    Attributes:
        device: "cpu" or "cuda".
        gpus: number of processes; 1 on a CPU.
        minutes: time limit of the training with its last evaluation; None: the recipe's schedule.
        seconds_per_iteration: as measured; None: the recipe's estimate.
        weights: checkpoint to start from; None: the recipe's.
        configs: the folder of published configs; None: that of the checkout.
    """

    device: str
    gpus: int = 1
    minutes: float | None = None
    seconds_per_iteration: float | None = None
    weights: str | None = None
    configs: Path | None = None


def config_text(
    train: CheckedSet, datasets: Sequence[tuple[str, Source]], wishes: Wishes, file: Path, *, images: tuple[int, int]
) -> str:
    """The YAML.

    Args:
        train: the training data, of which the images of a sample were looked at.
        datasets: name and files; the first is for training, the second, if there is one, for evaluation.
        wishes: of the user.
        file: that is to be written, for the path of its base.
        images: number of images for training and for evaluation.

    Raises:
        ValueError: a time limit whose steps cannot be estimated, or no image that can be read.
        FileNotFoundError: there is no folder of published configs.
    """
    recipe, kind = RECIPES[wishes.device], train.source.kind
    if not any(scan.size for scan in train.scans):
        raise ValueError("there must be at least one image that can be read")
    side = choices.test_side(train.scans, [category.is_thing for category in train.categories], recipe)
    crop = choices.crop_side(side, recipe)
    plan = choices.schedule(images[0], wishes.gpus, recipe, _iterations(recipe, wishes, crop, images[1]))
    tree: dict[str, Any] = {"_BASE_": _base(recipe.bases[kind], wishes.configs, file)}
    _put(tree, _data_settings(datasets, train))
    _put(tree, recipe.settings)
    _put(tree, _size_settings(side, crop, kind, recipe))
    _put(tree, _schedule_settings(plan, images[0], has_val=len(datasets) > 1))
    queries = choices.num_queries(train.scans, side, crop, recipe)
    counts = [len(scan.objects) for scan in train.scans]
    what = "classes" if kind == "semantic" else "objects"
    _put(tree, {"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": Noted(queries, f"images have up to {max(counts)} {what}")})
    if queries > 100:
        _put(tree, {"TEST.DETECTIONS_PER_IMAGE": queries})
    if wishes.weights is not None:
        _put(tree, {"MODEL.WEIGHTS": wishes.weights})
    _put(tree, {"OUTPUT_DIR": f"output/{file.stem}"})
    head = [
        f"# Written by `python -m mask2former data config` for {images[0]} images: {recipe.what}.",
        "# docs/custom_dataset.md says where each number comes from.",
    ]
    return "\n".join([*head, *yaml_lines(tree)]) + "\n"


def _iterations(recipe: Recipe, wishes: Wishes, crop: int, val_images: int) -> int | None:
    if wishes.minutes is None:
        return None
    seconds = wishes.seconds_per_iteration
    if seconds is None:
        if recipe.seconds_per_iteration is None:
            raise ValueError(
                "--budget-minutes needs --seconds-per-iteration with --device cuda, since GPUs differ too much: the "
                "log of a training shows it as `time`"
            )
        megapixels = choices.batch_size(wishes.gpus, recipe) * crop * crop / 1e6
        seconds = recipe.seconds_per_iteration + recipe.seconds_per_megapixel * megapixels
    return choices.iterations_in(wishes.minutes, seconds, val_images * recipe.seconds_per_test_image)


def _data_settings(datasets: Sequence[tuple[str, Source]], train: CheckedSet) -> dict[str, Any]:
    kind = train.source.kind
    wanted = {"semantic": "SEMANTIC_ON", "panoptic": "PANOPTIC_ON"}.get(kind, "INSTANCE_ON")
    on = {wanted}
    if kind == "panoptic":
        on |= {"INSTANCE_ON"} if train.source.coco_json else set()
        on |= {"SEMANTIC_ON"} if train.source.semantic_masks else set()
    settings: dict[str, Any] = {
        "DATASETS.TRAIN": [datasets[0][0]],
        "DATASETS.TEST": [name for name, _ in datasets[1:]],
        "DATASETS.CUSTOM": [{"NAME": name, **source.to_mapping()} for name, source in datasets],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(train.categories),
    }
    if kind == "semantic":
        settings["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"] = train.source.ignore_label
    for key in ("SEMANTIC_ON", "INSTANCE_ON", "PANOPTIC_ON"):
        settings[f"MODEL.MASK_FORMER.TEST.{key}"] = key in on
    return settings


def _size_settings(side: int, crop: int, kind: Kind, recipe: Recipe) -> dict[str, Any]:
    sides = choices.train_sides(side, recipe)
    return {
        "INPUT.DATASET_MAPPER_NAME": _MAPPERS[kind],
        "INPUT.MIN_SIZE_TRAIN": sides,
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.MAX_SIZE_TRAIN": 4 * max(sides),
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TEST": 4 * side,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": [crop, crop],
        "INPUT.SIZE_DIVISIBILITY": crop,
        "INPUT.COLOR_AUG_SSD": True,
    }


def _schedule_settings(plan: choices.Schedule, images: int, *, has_val: bool) -> dict[str, Any]:
    epochs = plan.iterations * plan.batch / images
    return {
        "SOLVER.IMS_PER_BATCH": plan.batch,
        "SOLVER.BASE_LR": Noted(plan.learning_rate, f"scaled from batch {REFERENCE_BATCH}"),
        "SOLVER.MAX_ITER": Noted(plan.iterations, f"{epochs:.1f} times each image"),
        "SOLVER.CHECKPOINT_PERIOD": plan.period,
        "TEST.EVAL_PERIOD": plan.period if has_val else 0,
    }


def _base(name: str, configs: Path | None, file: Path) -> str:
    """The base as the written file names it: a relative path inside the checkout, an absolute one outside."""
    folder = (configs or _CHECKOUT / "configs").resolve()
    base = folder / name
    if not base.is_file():
        raise FileNotFoundError(
            f"there is no {base}: --configs must name the folder `configs` of a checkout of this project"
        )
    inside = file.resolve().is_relative_to(folder.parent)
    return Path(os.path.relpath(base, file.resolve().parent)).as_posix() if inside else base.as_posix()


def _put(tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Dotted keys into nested sections."""
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value

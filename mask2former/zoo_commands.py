"""``python -m mask2former models``: lists the published models, and fetches one."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mask2former.zoo import PublishedModel

_HEAD = ("name", "task", "data", "backbone", "score", "parameters", "licence")


def add_models_command(commands: Any) -> None:
    """Adds ``models``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser("models", help="list the published models, or fetch one; docs/published_models.md")
    parser.add_argument("--task", choices=("panoptic", "instance", "semantic"), help="only models trained for it")
    parser.add_argument("--data", metavar="NAME", help="only models trained on it, such as coco")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="everything that is known of them, as JSON")
    output.add_argument("--download", metavar="NAME", help="fetch this model and print the path of its file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, models: "Mapping[str, PublishedModel] | None" = None) -> int:
    """List or fetch; returns the exit code.

    Args:
        args: parsed.
        models: by name; None for `mask2former.zoo.MODELS`.
    """
    from mask2former import zoo

    models = zoo.MODELS if models is None else models
    try:
        if args.download is not None:
            _refuse_filters(args)
            print(zoo.fetch(zoo.find_model(args.download, models)))
        else:
            chosen = _chosen(models, args)
            print(_json(chosen) if args.json else _table(chosen))
    except (ValueError, OSError) as error:
        print(f"python -m mask2former models: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept for the next time", file=sys.stderr)
        return 130
    return 0


def _refuse_filters(args: argparse.Namespace) -> None:
    for option in ("task", "data"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} is for lists and cannot go with --download {args.download}")


def _chosen(models: Mapping[str, "PublishedModel"], args: argparse.Namespace) -> list["PublishedModel"]:
    known = list(dict.fromkeys(model.data for model in models.values()))
    if args.data not in (None, *known):
        raise ValueError(f"--data must be one of {', '.join(known)}, got {args.data}")
    return [model for model in models.values() if args.task in (None, model.task) and args.data in (None, model.data)]


def _json(models: Iterable["PublishedModel"]) -> str:
    keys = ("name", "data", "task", "backbone", "million_parameters", "scores", "license", "config", "url", "dataset")
    return json.dumps(
        [
            {key: getattr(model, key) for key in keys}
            | {"sha256_prefix": model.sha256_prefix, "cached_file": str(model.cached_file)}
            | {"categories": [category.name for category in model.categories], "settings": vars(model.settings)}
            for model in models
        ],
        indent=1,
        ensure_ascii=False,
    )


def _table(models: Iterable["PublishedModel"]) -> str:
    rows = [_HEAD, *(_row(model) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(model: "PublishedModel") -> tuple[str, ...]:
    metric, score = next(iter(model.scores.items()))
    size = f"{model.million_parameters:.1f} M"
    return model.name, model.task, model.data, model.backbone, f"{metric} {score:.1f}", size, model.license

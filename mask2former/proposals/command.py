"""``python -m mask2former proposals``."""

import argparse
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mask2former.data.catalog import UnknownDatasetError

if TYPE_CHECKING:
    from mask2former.predictor import Predictor
    from mask2former.proposals.recall import RecallReport

_PANEL = 480  # longer side, in pixels
_COLUMNS = {"AR@10": "AR@10", "AR@100": "AR@100", "AR@100_th": "AR@100 things", "AR@100_st": "AR@100 stuff"}


def add_proposals_command(commands: Any) -> None:
    """Adds ``proposals``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser(
        "proposals", help="what queries find before the decoder and after each layer; docs/proposals.md"
    )
    parser.add_argument("--model", required=True, help="model file, or name of a published model")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    drawing = parser.add_argument_group("pictures")
    drawing.add_argument("--input", nargs="+", default=[], metavar="PATH", type=Path, help="pictures, folders of them")
    drawing.add_argument("--output", metavar="FOLDER", type=Path, help="where a sheet for each picture is written")
    drawing.add_argument(
        "--top", type=_positive, default=10, metavar="N", help="best regions that are drawn, default 10"
    )
    drawing.add_argument(
        "--threshold", type=float, default=0.1, metavar="T", help="least score of what is drawn, default 0.1"
    )
    recall = parser.add_argument_group("average recall")
    recall.add_argument("--dataset", metavar="NAME", help="registered data set with ground truth")
    recall.add_argument("--config-file", metavar="FILE", help="config whose DATASETS.CUSTOM has the data set")
    recall.add_argument("--first", type=_positive, metavar="N", help="only the first images")
    recall.add_argument("--json", metavar="FILE", type=Path, help="write the numbers as JSON too")
    parser.set_defaults(run=run_proposals)


def run_proposals(args: argparse.Namespace) -> int:
    """Draw and measure.

    The exit code is 1 if a picture cannot be read, 2 if the command is not possible, 130 if it was interrupted.
    """
    try:
        _check(args)
        return _run(args)
    except (OSError, ValueError, ModuleNotFoundError, UnknownDatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the sheets that were written are complete", file=sys.stderr)
        return 130


def _check(args: argparse.Namespace) -> None:
    if not args.input and args.dataset is None:
        raise ValueError("--input with pictures, or --dataset, must be given")
    if bool(args.input) != (args.output is not None):
        raise ValueError("--input and --output go together")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {args.threshold}")
    for name in ("config_file", "first", "json"):
        if getattr(args, name) is not None and args.dataset is None:
            raise ValueError(f"--{name.replace('_', '-')} is about a data set and needs --dataset")
    if args.config_file is not None and not Path(args.config_file).is_file():
        raise FileNotFoundError(f"--config-file: there is no file {args.config_file}")
    if args.json is not None and not args.json.parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder {args.json.parent}")


def _run(args: argparse.Namespace) -> int:
    from mask2former import load
    from mask2former.proposals.regions import check_proposes

    pictures = list(_pictures(args.input))
    predictor = load(args.model, args.device)
    check_proposes(predictor.model)
    if args.dataset is not None:
        _measure(predictor, args)
    return _draw(predictor, pictures, args) if pictures else 0


def _measure(predictor: "Predictor", args: argparse.Namespace) -> None:
    from mask2former.atomic_files import write_atomically
    from mask2former.data import catalog
    from mask2former.evaluation.progress import with_progress
    from mask2former.export.sources import read_config
    from mask2former.proposals.recall import proposal_recall

    if args.config_file is not None:
        read_config(args.config_file)  # registers its data sets
    entry = catalog.get(args.dataset)
    records = entry.load()[: args.first]
    images = with_progress(records, entry.name, here=len(records), overall=len(records))
    report = proposal_recall(predictor, images, entry.metadata)
    print(f"{entry.name}: {report.images} images, {report.segments} segments\n")
    print(_table(report), end="")
    if args.json is not None:
        document = {"model": args.model, "dataset": entry.name} | report._asdict() | {"layers": _rows(report)}
        write_atomically(args.json, json.dumps(document, indent=1).encode())


def _table(report: "RecallReport") -> str:
    from mask2former.evaluation.reporting import table

    keys = list(next(iter(report.layers.values()), {}))
    rows = [[layer, *(f"{numbers[key]:.2f}" for key in keys)] for layer, numbers in report.layers.items()]
    return table(["prediction", *(_COLUMNS[key] for key in keys)], rows)


def _rows(report: "RecallReport") -> list[dict[str, Any]]:
    """Nan is null in JSON."""
    return [
        {"prediction": layer} | {key: None if math.isnan(value) else value for key, value in numbers.items()}
        for layer, numbers in report.layers.items()
    ]


def _pictures(inputs: Iterable[Path]) -> Iterable[Path]:
    """Files, and the pictures in folders.

    Raises:
        FileNotFoundError: if there is no such file, or no picture in a folder.
    """
    from mask2former.data.records import IMAGE_SUFFIXES

    for path in inputs:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"--input: there is no file {path}")
            yield path
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"--input: there are no pictures in {path}")
        yield from found


def _draw(predictor: "Predictor", pictures: Sequence[Path], args: argparse.Namespace) -> int:
    from mask2former.atomic_files import write_atomically

    args.output.mkdir(parents=True, exist_ok=True)
    code = 0
    taken: set[str] = set()
    for path in pictures:
        try:
            sheet = _sheet(predictor, path, args.top, args.threshold)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        target = args.output / _free_name(path.stem, taken)
        write_atomically(target, sheet)
        print(target)
    return code


def _free_name(stem: str, taken: set[str]) -> str:
    """Name of the sheet: another one for each picture, also where only folders or suffixes differ."""
    name, number = f"{stem}_proposals.jpg", 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}_proposals_{number}.jpg"
    taken.add(name.lower())
    return name


def _sheet(predictor: "Predictor", path: Path, top: int, threshold: float) -> bytes:
    """The sheet of a picture as JPEG."""
    from PIL import Image

    from mask2former.data.images import as_rgb
    from mask2former.proposals.regions import propose
    from mask2former.proposals.sheet import panel_picture, proposal_sheet

    pixels = as_rgb(path)
    planes, _ = predictor.model_input(pixels)
    panel = panel_picture(pixels, _PANEL)
    layers = propose(predictor.model, planes, (panel.shape[0], panel.shape[1]), limit=top)
    buffer = io.BytesIO()
    Image.fromarray(proposal_sheet(panel, layers, threshold=threshold)).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number

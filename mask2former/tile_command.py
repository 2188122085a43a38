"""``python -m mask2former tile``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mask2former.checkpoint import TASKS


def add_tile_command(commands: Any) -> None:
    """Adds ``tile``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    tile = commands.add_parser("tile", help="segment a raster larger than memory, tile by tile; docs/huge_images.md")
    tile.add_argument("--model", required=True, help="model file, or name of a published model")
    tile.add_argument("--input", required=True, metavar="FILE", type=Path, help="TIFF, or another file that GDAL reads")
    tile.add_argument(
        "--output", required=True, metavar="FILE", type=Path, help="*.tif, with a .json beside it; instances: *.json"
    )
    tile.add_argument("--task", choices=TASKS, help="default: the first that the model is for")
    tile.add_argument("--tile", type=int, default=1024, metavar="N", help="height and width of a tile, default 1024")
    tile.add_argument("--overlap", type=int, default=128, metavar="N", help="of neighbouring tiles, default 128")
    tile.add_argument(
        "--threshold", type=float, metavar="T", help="least score; default: 0.5 for instances, else the model's"
    )
    tile.add_argument("--bands", type=int, nargs="+", metavar="N", help="one or three, from 1; default: first three")
    tile.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values that become 0 and 255"
    )
    tile.add_argument("--device", default="cpu", help="default: cpu")
    tile.set_defaults(run=run_tile)


def run_tile(args: argparse.Namespace) -> int:
    """Segment the raster; the exit code is 2 if that is not possible, and 130 if it was interrupted."""
    try:
        print(_segment(args))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _segment(args: argparse.Namespace) -> str:
    from tqdm import tqdm

    from mask2former import load
    from mask2former.tiling.large import segment_large
    from mask2former.tiling.results import LargeInstances, LargePanoptic

    predictor = load(args.model, args.device)
    task = args.task or predictor.settings.tasks[0]
    threshold = 0.5 if args.threshold is None and task == "instance" else args.threshold
    with tqdm(unit=" tiles", disable=None) as bar:

        def progress(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        result = segment_large(
            predictor,
            args.input,
            task,
            output=args.output,
            tile=args.tile,
            overlap=args.overlap,
            threshold=threshold,
            bands=args.bands,
            value_range=args.value_range,
            progress=progress,
        )
    if isinstance(result, LargePanoptic):
        return f"{args.output}: {len(result.segments)} segments"
    if isinstance(result, LargeInstances):
        return f"{args.output}: {result.count} instances"
    return f"{args.output}: {sum(area > 0 for area in result.areas)} classes"

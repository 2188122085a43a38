"""``python -m mask2former export``."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mask2former.checkpoint import Task
    from mask2former.export.sources import Source

FORMATS = (".safetensors", ".onnx", ".pt2")
DTYPES = ("float32", "float16")


def add_export_command(commands: Any) -> None:
    """Adds ``export``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser("export", help="write a model as one file that needs no config; docs/export.md")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", metavar="FILE", help="YAML config of the model; needs --weights")
    source.add_argument("--model", metavar="M", help="instead: a model file, or the name of a published one")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of the training")
    parser.add_argument("--to", required=True, type=_target, metavar="FILE", help=f"to write, {_either(FORMATS)}")
    parser.add_argument("--task", choices=("panoptic", "instance", "semantic"), help="default: the model's first one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 for .safetensors, float32 for others")
    parser.add_argument("--check", action="store_true", help="compare file and model; exit code 1 if they differ")
    parser.add_argument("--check-picture", metavar="FILE", help="to compare on; default: a made-up one")
    parser.add_argument("--note", action="append", default=[], type=_note, metavar="NAME=TEXT", help="kept in the file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    parser.set_defaults(run=_told(export))


def export(args: argparse.Namespace) -> int:
    """Write the file and, if asked for, compare it with the model."""
    import torch

    from mask2former.checkpoint import save_model_file
    from mask2former.export.files import metadata, trace, write_onnx, write_program
    from mask2former.export.graph import SegmentationGraph

    _check_arguments(args)
    source = _source(args)
    task = args.task or source.description.settings.tasks[0]
    start = time.perf_counter()
    if args.to.suffix == ".safetensors":
        dtype = getattr(torch, args.dtype or "float16")
        save_model_file(args.to, source.network, source.description, dtype=dtype)
        what = f"for {', '.join(source.description.settings.tasks)}"
    else:
        dtype = getattr(torch, args.dtype or "float32")
        graph = SegmentationGraph(source.network, source.description, task, dtype=dtype)
        write = write_onnx if args.to.suffix == ".onnx" else write_program
        write(args.to, trace(graph), metadata(task, source.description))
        what = f"for {task}"
    seconds, megabytes = time.perf_counter() - start, args.to.stat().st_size / 1e6
    classes = len(source.description.categories)
    print(f"{args.to}: {classes} classes, {what}; {megabytes:.1f} MB, written in {seconds:.0f} s", flush=True)
    return _compared(args, source, task) if args.check else 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot end well before minutes were spent."""
    from mask2former.export.files import require

    if (args.config_file is None) != (args.weights is None):
        raise ValueError("--weights must be given with --config-file, and only with it")
    if args.opts and args.config_file is None:
        raise ValueError(f"KEY VALUE must be given with --config-file only, got {' '.join(args.opts)}")
    if args.check_picture and not args.check:
        raise ValueError("--check-picture must be given with --check only")
    if args.task and args.to.suffix == ".safetensors" and not args.check:
        raise ValueError("--task must not be given for .safetensors without --check: the file is for all tasks")
    if args.to.is_dir() or not args.to.parent.is_dir():
        raise ValueError(f"--to must name a file in an existing folder, got {args.to}")
    if args.to.suffix == ".onnx":
        require("onnx", "onnxscript", *(["onnxruntime"] if args.check else []))


def _source(args: argparse.Namespace) -> "Source":
    from mask2former.export.sources import from_config, from_model

    notes = dict(args.note)
    if args.model is not None:
        source = from_model(args.model, notes)
    else:
        source = from_config(args.config_file, args.weights, args.opts, notes)
    tasks = source.description.settings.tasks
    if args.task and args.task not in tasks:
        raise ValueError(f"--task must be one of {', '.join(tasks)}, which the model is for, got {args.task}")
    return source


def _compared(args: argparse.Namespace, source: "Source", task: "Task") -> int:
    """Print what `compare` finds; the exit code."""
    from mask2former.checkpoint import load_model_file
    from mask2former.data.images import read_image
    from mask2former.export import check
    from mask2former.export.files import module_runner, onnx_runner, program_runner
    from mask2former.export.graph import SegmentationGraph

    picture = read_image(args.check_picture) if args.check_picture else check.made_up_picture()
    if args.to.suffix == ".onnx":
        run = onnx_runner(args.to)
    elif args.to.suffix == ".pt2":
        run = program_runner(args.to)
    else:
        run = module_runner(SegmentationGraph(*load_model_file(args.to), task))
    comparisons = []
    for comparison in check.compare(run, source.network, source.description, task, picture):
        print(comparison, flush=True)
        comparisons.append(comparison)
    if not any(c.compared for c in comparisons):
        print("nothing was compared: the model finds nothing in this picture; --check-picture takes another one")
        return 1
    if not all(c.agrees for c in comparisons):
        limits = f"IoU of at least {check.SMALLEST_IOU} and scores within {check.LARGEST_SCORE_DIFFERENCE}"
        print(f"{args.to} is not equal to the model: {limits} are wanted")
        return 1
    return 0


def _target(text: str) -> Path:
    if Path(text).suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end with {_either(FORMATS)}, got {text}")
    return Path(text)


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _note(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"must have the form NAME=TEXT, got {text}")
    return name, value


def _told(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command with errors that are for the user as one line and exit code 2."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except KeyboardInterrupt:
            print("python -m mask2former export: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError, ImportError) as error:
            print(f"python -m mask2former export: {error}", file=sys.stderr)
            return 2

    return run

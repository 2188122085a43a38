"""Commands: ``python -m mask2former export`` writes a model file from a config and its weights."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

DTYPES = ("float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mask2former", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a model file that needs neither config nor Detectron2")
    export.add_argument("--config-file", required=True, help="YAML config of the model")
    export.add_argument("--weights", required=True, help="checkpoint of the training")
    export.add_argument("--to", required=True, help="file to write, *.safetensors")
    export.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored weights")
    export.add_argument("--note", action="append", default=[], metavar="NAME=TEXT", help="kept in the file")
    export.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(arguments)
    if not args.to.endswith(".safetensors"):
        export.error(f"--to must end with .safetensors, got {args.to}")
    if not all("=" in note for note in args.note):
        export.error(f"--note must have the form NAME=TEXT, got {args.note}")
    return _export(args)


def _export(args: argparse.Namespace) -> int:
    import torch

    export_model: Callable[..., Any]
    get_config: Callable[..., Any]
    if find_spec("detectron2") is None:
        from mask2former.engine.config import get_config
        from mask2former.engine.predictor import export_model
    else:
        from mask2former.d2 import export_model, get_config

    cfg = get_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", args.weights])
    notes = dict(note.split("=", 1) for note in args.note)
    description = export_model(cfg, args.to, dtype=getattr(torch, args.dtype), notes=notes)
    print(f"{args.to}: {len(description.categories)} classes, for {', '.join(description.settings.tasks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

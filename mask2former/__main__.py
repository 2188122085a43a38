"""Commands: ``python -m mask2former export`` writes a model file, ``convert`` renames weights, ``models`` lists and
fetches the published models, ``data`` checks and prepares one's own data, ``tile`` segments a raster larger than
memory.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from mask2former.convert import add_convert_command
from mask2former.own_data.commands import add_data_commands
from mask2former.tile_command import add_tile_command
from mask2former.zoo_commands import add_models_command

DTYPES = ("float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mask2former", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_export, add_convert_command, add_data_commands, add_models_command, add_tile_command):
        add(commands)
    args = parser.parse_args(arguments)
    return int(args.run(args))


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model file that needs neither config nor Detectron2")
    export.add_argument("--config-file", required=True, help="YAML config of the model")
    export.add_argument("--weights", required=True, help="checkpoint of the training")
    export.add_argument("--to", required=True, type=_model_file, help="file to write, *.safetensors")
    export.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored weights")
    export.add_argument("--note", action="append", default=[], type=_note, metavar="NAME=TEXT", help="kept in the file")
    export.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    export.set_defaults(run=_export)


def _model_file(text: str) -> str:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"must end with .safetensors, got {text}")
    return text


def _note(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"must have the form NAME=TEXT, got {text}")
    return name, value


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
    description = export_model(cfg, args.to, dtype=getattr(torch, args.dtype), notes=dict(args.note))
    print(f"{args.to}: {len(description.categories)} classes, for {', '.join(description.settings.tasks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

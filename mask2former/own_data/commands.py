"""``python -m mask2former data check|register|config``."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mask2former.own_data.arguments import add_source_arguments, sources_of
from mask2former.own_data.check import check, compare, compare_classes
from mask2former.own_data.config_writer import Wishes, config_text
from mask2former.own_data.quick_check import quick_check
from mask2former.own_data.recipes import RECIPES
from mask2former.own_data.registration import CustomDataset
from mask2former.own_data.report import finding_lines, report_dict, report_lines
from mask2former.own_data.yaml_text import add_custom_datasets, yaml_lines

Command = Callable[[argparse.Namespace], int]


def add_data_commands(commands: Any) -> None:
    """Adds ``data`` and its commands; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    data = commands.add_parser("data", help="check your own data, and make them trainable; docs/custom_dataset.md")
    inner = data.add_subparsers(dest="data_command", required=True)
    _add_check(inner)
    _add_register(inner)
    _add_config(inner)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="find every fault in your data; exit code 1 if there is one")
    parser.add_argument("--forbid-overlaps", action="store_true", help="masks of objects must not share pixels")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all findings and counts as JSON too")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each processor")
    add_source_arguments(parser)
    parser.set_defaults(run=_told(run_check))


def _add_register(commands: Any) -> None:
    parser = commands.add_parser("register", help="write the entry of DATASETS.CUSTOM that makes data trainable")
    parser.add_argument("--name", required=True, help="of the data set; _train and _val are added if both are given")
    parser.add_argument("--add-to", metavar="FILE", type=Path, help="config to put the entry into; else it is printed")
    add_source_arguments(parser)
    parser.set_defaults(run=_told(register))


def _add_config(commands: Any) -> None:
    parser = commands.add_parser("config", help="write a config with settings that fit your data")
    parser.add_argument("--to", required=True, metavar="FILE", type=Path, help="YAML file to write")
    parser.add_argument("--name", help="of the data sets, before _train and _val; default: that of the file")
    parser.add_argument("--device", choices=sorted(RECIPES), help="default: cuda where PyTorch finds it")
    parser.add_argument("--gpus", type=_positive(int), default=1, metavar="N", help="that the training will have")
    parser.add_argument("--budget-minutes", type=_positive(float), metavar="M", help="of training and last evaluation")
    parser.add_argument(
        "--seconds-per-iteration", type=_positive(float), metavar="S", help="as measured, for the budget"
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint to start from: MODEL.WEIGHTS")
    parser.add_argument("--configs", metavar="FOLDER", type=Path, help="published configs; default: of this checkout")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of another content")
    parser.add_argument("--images-looked-at", type=_positive(int), default=1000, metavar="N", help="default 1000")
    add_source_arguments(parser)
    parser.set_defaults(run=_told(write_config))


def write_config(args: argparse.Namespace) -> int:
    """Look at the data and write the config; exit code 1, and no config, if they have faults."""
    named, file = sources_of(args), args.to
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and args.gpus > 1:
        raise ValueError(f"--gpus must be 1 with --device cpu, got {args.gpus}")
    datasets = named.named(args.name or file.stem)
    for name, source in datasets:
        print(f"{name}: {quick_check(CustomDataset(name, source))}", file=sys.stderr)
    sets = [check(source, name, at_most=args.images_looked_at) for name, source in datasets]
    if faults := [
        *(f for part in sets for f in part.faults),
        *(f for f in compare_classes(sets) if f.level == "fault"),
    ]:
        print("\n".join(finding_lines(faults)), file=sys.stderr)
        print("no config was written: `data check` shows all faults", file=sys.stderr)
        return 1
    images = [part.images for part in sets]
    wishes = Wishes(
        device=device,
        gpus=args.gpus,
        minutes=args.budget_minutes,
        seconds_per_iteration=args.seconds_per_iteration,
        weights=args.weights,
        configs=args.configs,
    )
    text = config_text(sets[0], datasets, wishes, file, images=(images[0], sum(images[1:])))
    if file.exists() and not args.overwrite and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} is there already with another content; --overwrite replaces it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {RECIPES[device].what}", file=sys.stderr)
    print(f"to train: python train_net.py --config-file {file}" + (f" --num-gpus {args.gpus}" if args.gpus > 1 else ""))
    return 0


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return parse


def run_check(args: argparse.Namespace) -> int:
    """Check the data, and print what was found."""
    named = sources_of(args)
    sets = [
        check(source, name, forbids_overlaps=args.forbid_overlaps, processes=args.processes)
        for name, source in (("training data", named.train), ("validation data", named.val))
        if source is not None
    ]
    together = compare(*sets) if len(sets) == 2 else []
    print("\n".join(report_lines(sets, together)))
    if args.json is not None:
        args.json.write_text(json.dumps(report_dict(sets, together), indent=1), encoding="utf-8")
    return int(any(finding.level == "fault" for part in sets for finding in part.findings + together))


def register(args: argparse.Namespace) -> int:
    """Check quickly that the data can be loaded, and print the entry or add it to a config."""
    rows = []
    for name, source in sources_of(args).named(args.name):
        summary = quick_check(CustomDataset(name, source))
        print(f"{name}: {summary}", file=sys.stderr)
        rows.append({"NAME": name, **source.to_mapping()})
    if args.add_to is None:
        print("\n".join(yaml_lines({"DATASETS": {"CUSTOM": rows}})))
        return 0
    old = args.add_to.read_text(encoding="utf-8") if args.add_to.exists() else ""
    args.add_to.write_text(add_custom_datasets(old, rows, args.add_to), encoding="utf-8")
    print(f"{args.add_to}: added {', '.join(row['NAME'] for row in rows)} to DATASETS.CUSTOM", file=sys.stderr)
    return 0


def _told(command: Command) -> Command:
    """The command with errors that are for the user as one line and exit code 2."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except (ValueError, OSError) as error:
            print(f"python -m mask2former data: {error}", file=sys.stderr)
            return 2

    return run

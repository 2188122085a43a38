"""``python -m mask2former data check|register|config``."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mask2former.own_data.arguments import add_source_arguments, sources_of
from mask2former.own_data.check import check, compare
from mask2former.own_data.quick_check import quick_check
from mask2former.own_data.registration import CustomDataset
from mask2former.own_data.report import report_dict, report_lines
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

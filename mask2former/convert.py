"""``python -m mask2former convert``: weights under other names or in another format."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mask2former.checkpoint import METADATA_KEY
from mask2former.weight_files import (
    WEIGHT_SUFFIXES,
    other_entries,
    read_safetensors,
    read_weights,
    state_dict_of,
    write_weights,
)
from mask2former.weight_names import NAMINGS, Naming, check_naming, naming_of, to_published, to_transformers


class Conversion(NamedTuple):
    """What was done.

    Attributes:
        before: whose names the file had.
        written: number of tensors that were written.
        dropped: tensors of the file without a counterpart, by name.
        left_out: what else the file held, such as the state of an optimizer.
    """

    before: Naming
    written: int
    dropped: tuple[str, ...]
    left_out: tuple[str, ...]


def add_convert_command(commands: Any) -> None:
    """Adds ``convert``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser("convert", help="weights under other names or in another format; docs/model_files.md")
    parser.add_argument("--from", dest="source", required=True, metavar="FILE", type=Path, help="weights to read")
    target_help = "file to write: .safetensors, .pth or .pkl"
    parser.add_argument("--to", dest="target", required=True, metavar="FILE", type=Path, help=target_help)
    names_help = "names of the tensors in it; published ones are those of this project and of Detectron2"
    parser.add_argument("--names", required=True, choices=NAMINGS, help=names_help)
    parser.set_defaults(run=_run)


def convert(source: Path, target: Path, names: Naming) -> Conversion:
    """Write the weights of a file under the names that are asked for; bits stay as they are.

    The file appears complete or not at all; an older one is replaced. The description in a model file goes along if
    the result is one, too: safetensors with published names.

    Args:
        source: as `mask2former.weight_files.read_weights` takes it.
        target: as `mask2former.weight_files.write_weights` takes it.
        names: "published" or "transformers".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source cannot be read or holds a tensor whose other name is not known, or the target is the
            source or has an ending that no format has; names the file.
        OSError: if the target cannot be written.
    """
    check_naming(names)
    if target.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"--to must end with {', '.join(WEIGHT_SUFFIXES)}, got {target}")
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"--to must be another file than --from, got {source} and {target}")
    content = read_weights(source)
    tensors = state_dict_of(content, str(source))
    if not tensors:
        raise ValueError(f"{source} holds no tensors")
    try:
        renamed, dropped = _renamed(tensors, names)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    description = read_safetensors(source)[1].get(METADATA_KEY) if source.suffix == ".safetensors" else None
    keeps_description = description is not None and names == "published" and target.suffix == ".safetensors"
    metadata = {METADATA_KEY: description} if description is not None and keeps_description else None
    write_weights(target, renamed, naming=names, metadata=metadata)
    lost = () if description is None or keeps_description else ("the description of the model",)
    return Conversion(naming_of(tensors), len(renamed), dropped, (*lost, *other_entries(content)))


def _renamed(tensors: Mapping[str, Tensor], names: Naming) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors under their other names, and those that have none."""
    if naming_of(tensors) == "published":
        return (dict(tensors) if names == "published" else to_transformers(tensors).tensors), ()
    published, unused = to_published(tensors)
    if names == "published":
        return published, unused
    again = to_transformers(published).tensors  # there are two sets of names of transformers
    return again, tuple(name for name in unused if name not in again)


def _run(args: argparse.Namespace) -> int:
    try:
        done = convert(args.source, args.target, args.names)
    except (ValueError, OSError) as error:
        print(f"python -m mask2former convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{args.target}: {done.written} tensors with {args.names} names; {args.source} had {done.before} names")
    if done.dropped:
        print(f"left out, which no model computes anything with: {', '.join(done.dropped)}")
    if done.left_out:
        print(f"left out, which are no weights: {', '.join(done.left_out)}")
    return 0

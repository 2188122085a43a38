"""Commands: ``python -m mask2former export`` writes a model file, ``convert`` renames weights, ``models`` lists and
fetches the published models, ``data`` checks and prepares one's own data, ``tile`` segments a raster larger than
memory, ``proposals`` shows what queries find before the decoder and after each layer,
``analyze`` counts and times the model of a config.
"""

import argparse
import sys
from collections.abc import Sequence

from mask2former.analysis.command import add_analyze_command
from mask2former.convert import add_convert_command
from mask2former.export.command import add_export_command
from mask2former.own_data.commands import add_data_commands
from mask2former.proposals.command import add_proposals_command
from mask2former.tile_command import add_tile_command
from mask2former.zoo_commands import add_models_command

_COMMANDS = (
    add_export_command,
    add_convert_command,
    add_data_commands,
    add_models_command,
    add_tile_command,
    add_proposals_command,
    add_analyze_command,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mask2former", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in _COMMANDS:
        add(commands)
    args = parser.parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Train or evaluate: train_net.py [--engine auto|detectron2|embedded] --config-file F [--eval-only] [KEY VALUE ...]."""

import argparse
import sys
from importlib.util import find_spec

ENGINES = ("auto", "detectron2", "embedded")
NEEDS = {
    "detectron2": ("detectron2",),
    "embedded": ("lightning_fabric", "yaml"),
}


def choose(engine: str) -> str:
    """The engine to take; ends the program if it is not there."""
    if engine == "auto":
        engine = "detectron2" if find_spec("detectron2") is not None else "embedded"
    missing = [name for name in NEEDS[engine] if find_spec(name) is None]
    if missing:
        how = {
            "detectron2": "README.md has the commands, or take --engine embedded",
            "embedded": "pip install -r requirements-train.txt",
        }
        sys.exit(f"train_net.py: --engine {engine} needs {', '.join(missing)}, which is not installed; {how[engine]}")
    return engine


def main() -> int:
    """Give the arguments to the engine; returns the exit code."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--engine", choices=ENGINES, default="auto")
    args, others = first.parse_known_args()
    engine = choose(args.engine)
    print(f"train_net.py: engine {engine} ({'chosen' if args.engine != 'auto' else 'auto'})", flush=True)
    if engine == "embedded":
        from mask2former.engine.launch import main as run

        return run(others)
    from mask2former.d2.launch import main as run_detectron2

    run_detectron2(others)
    return 0


if __name__ == "__main__":
    sys.exit(main())

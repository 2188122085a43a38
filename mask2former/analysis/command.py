"""``python -m mask2former analyze``."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mask2former.analysis.images import AnalysedImage

_TASKS = ("flop", "activation", "parameter", "structure", "throughput")
_COUNTED = {"flop", "activation"}


def add_analyze_command(commands: Any) -> None:
    """Adds ``analyze``; `run` of the parsed arguments is the function to call with them.

    Args:
        commands: from `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser("analyze", help="parameters, FLOPs, speed ... of a config's model; docs/analyze.md")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config of the model")
    parser.add_argument("--tasks", nargs="+", choices=_TASKS, default=_TASKS[:3], help="default: the first three")
    parser.add_argument(
        "-n", "--num-inputs", type=_at_least(1), default=100, metavar="N", help="images of DATASETS.TEST, default 100"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=_at_least(1), nargs=2, metavar=("H", "W"), help="instead: one image of this size")
    size.add_argument(
        "--use-fixed-input-size", action="store_true", help="instead: one image of the square that the config trains on"
    )
    parser.add_argument("--all-layers", action="store_true", help="count the predictions of all decoder layers")
    parser.add_argument("--depth", type=_at_least(0), default=2, metavar="N", help="of the structure, default 2")
    parser.add_argument("--device", help="of the throughput; default: cuda if there is one, else cpu")
    parser.add_argument("--repeats", type=_at_least(1), default=10, metavar="N", help="of the throughput, default 10")
    parser.add_argument("--weights", metavar="FILE", help="of the model, for the throughput; default: random")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Analyse and print; the exit code is 2 if that is not possible, and 130 if it was interrupted."""
    try:
        results = _analyse(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"python -m mask2former analyze: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m mask2former analyze: interrupted", file=sys.stderr)
        return 130
    from mask2former.analysis.report import report

    print(json.dumps(results, indent=1) if args.json else report(results))
    return 0


def _at_least(minimum: int) -> Callable[[str], int]:
    """The type of a whole number."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text}")
        return int(text)

    return number


def _analyse(args: argparse.Namespace) -> dict[str, Any]:
    """By task, with what was analysed."""
    from mask2former.analysis import tasks
    from mask2former.analysis.parts import module_tree
    from mask2former.engine.config import get_config

    device = _device(args.device)
    cfg = get_config(args.config_file, args.opts)
    model = tasks.shape_model(cfg)
    results: dict[str, Any] = {"config": args.config_file}
    images: Sequence[AnalysedImage] = ()
    if (_COUNTED | {"throughput"}) & set(args.tasks):
        source, images = _images(args, cfg)
        results["inputs"] = tasks.describe_images(source, images, model.size_divisibility)
    if "parameter" in args.tasks:
        results["parameter"] = tasks.analyse_parameters(model)
    if "structure" in args.tasks:
        results["structure"] = module_tree(model, args.depth)
    if _COUNTED & set(args.tasks):
        counted = tasks.analyse_operations(model, images, all_layers=args.all_layers, progress=_with_bar)
        results |= {task: result for task, result in counted.items() if task in args.tasks}
    if "throughput" in args.tasks:
        results["throughput"] = tasks.analyse_throughput(
            cfg, images, device=device, repeats=args.repeats, weights=args.weights
        )
    return results


def _images(args: argparse.Namespace, cfg: Any) -> tuple[str, "Sequence[AnalysedImage]"]:
    from mask2former.analysis.images import AnalysedImage, fixed_input_size, images_of_test_set

    if args.size is not None or args.use_fixed_input_size:
        size = fixed_input_size(cfg) if args.size is None else (args.size[0], args.size[1])
        return "made up", [AnalysedImage(size, size)]
    name, images = images_of_test_set(cfg, args.num_inputs)
    return f"the first ones of {name}", images


def _device(name: str | None) -> str:
    import torch

    from mask2former.devices import device_problem

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if problem := device_problem(name):
        raise ValueError(f"--device must be one that can be used here, got {name}: {problem}")
    return name


def _with_bar(sizes: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    from tqdm import tqdm

    return tqdm(sizes, unit=" sizes", disable=None, leave=False)

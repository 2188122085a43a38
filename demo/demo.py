"""Segments pictures and draws the result: ``python demo/demo.py --input photo.jpg --output results``.

Exit codes: 0 all pictures done; 1 some could not be; 2 the command cannot be carried out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from mask2former.checkpoint import Task
    from mask2former.predictor import PanopticPicture, PictureResult, Predictor

DEFAULT_MODEL = Path(__file__).resolve().parent / "model.safetensors"
PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Without it a model shows its 100 best guesses, however bad.
INSTANCE_THRESHOLD = 0.5
_LISTED = 8


class CommandError(Exception):
    """The command cannot be carried out as given; its text is for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    args = _parse(arguments)
    try:
        return _run(args)
    except (CommandError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"demo: interrupted; the pictures in {args.output} so far are complete", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segments pictures and draws the result over them.",
        epilog="Example: python demo/demo.py --input demo/pictures --output results",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="pictures, folders of pictures, patterns such as 'photos/*.jpg'",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="FILE", help="model file (default: demo/model.safetensors)"
    )
    source.add_argument("--config-file", type=Path, metavar="FILE", help="config instead; with --opts MODEL.WEIGHTS W")
    parser.add_argument("--task", choices=("panoptic", "instance", "semantic"), help="default: the model's first")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="T",
        help="show what is surer than this, 0 to 1 (default: the model's own for panoptic, "
        f"{INSTANCE_THRESHOLD} for instances)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes of the config, such as MODEL.WEIGHTS model.pkl; must come last",
    )
    args = parser.parse_args(arguments)
    if args.opts and args.config_file is None:
        parser.error("--opts changes a config, so it needs --config-file")
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        parser.error(f"--confidence-threshold must be in [0, 1], got {threshold}")
    if threshold is not None and args.task == "semantic":
        parser.error("--confidence-threshold has no meaning for --task semantic, which labels every pixel")
    return args


def _run(args: argparse.Namespace) -> int:
    pictures, problems = find_pictures(args.input)
    if any(Path(p).is_dir() and os.path.realpath(p) == os.path.realpath(args.output) for p in args.input):
        raise CommandError(f"--output must be another folder than the --input folder {args.output}")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    if not pictures:
        return 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder --output {args.output}: {error.strerror}") from error
    if not os.access(args.output, os.W_OK):
        raise CommandError(f"cannot write into the folder --output {args.output}")
    predictor = _make_predictor(args)
    task: Task = args.task or predictor.settings.tasks[0]
    if task not in predictor.settings.tasks:
        raise CommandError(f"--task must be one of {', '.join(predictor.settings.tasks)} with this model, got {task}")
    threshold = args.confidence_threshold
    if task == "semantic" and threshold is not None:
        raise CommandError("--confidence-threshold has no meaning for semantic segmentation, the task of this model")
    if task == "instance" and threshold is None:
        threshold = predictor.settings.score_threshold or INSTANCE_THRESHOLD
    lines = _process(predictor, output_paths(pictures, args.output), task, threshold)
    if lines:
        print(f"Results are in {args.output}")
        print("\n".join(lines))
    return 1 if problems or len(lines) < len(pictures) else 0


def _process(
    predictor: Predictor, outputs: dict[Path, Path], task: Task, threshold: float | None
) -> list[str]:
    """Segment and draw every picture; returns one line for each that could be done."""
    from tqdm import tqdm

    from mask2former.checkpoint import write_atomically
    from mask2former.data.images import read_image

    lines = []
    for path, output in tqdm(outputs.items(), unit="picture", disable=None):
        try:
            pixels = read_image(path)
            result = predictor(pixels, task, threshold=threshold)
            write_atomically(output, _encode_png(predictor.draw(pixels, result)))
        except (OSError, ValueError, MemoryError) as error:
            tqdm.write(f"demo: skipped {path}: {error}", file=sys.stderr)
            continue
        renamed = "" if output.stem == path.stem else f" -> {output.name}"
        lines.append(f"{path.name}{renamed}: {summary(result)}")
    return lines


def _make_predictor(args: argparse.Namespace) -> Predictor:
    import torch

    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise CommandError(f"drawing needs OpenCV (pip install opencv-python-headless): {error}") from error
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # which of them depends on how PyTorch was built
        raise CommandError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if args.config_file is not None:
        return _predictor_from_config(args.config_file, args.opts, device)

    from mask2former.predictor import Predictor

    try:
        return Predictor.from_file(args.model, device)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model cannot be used: {error}") from error


def _predictor_from_config(config_file: Path, overrides: Sequence[str], device: str) -> Predictor:
    if not config_file.is_file():
        raise CommandError(f"--config-file: there is no file {config_file}")
    if importlib.util.find_spec("detectron2") is not None:
        from mask2former.d2 import predictor_from_config
        from mask2former.d2.config import get_config
    elif importlib.util.find_spec("yaml") is not None:
        from mask2former.engine.config import get_config
        from mask2former.engine.predictor import predictor_from_config
    else:
        raise CommandError(
            "--config-file needs PyYAML or Detectron2, and neither is installed (see README.md); "
            "--model with a model file works without them"
        )
    try:
        return predictor_from_config(get_config(config_file, ["MODEL.DEVICE", device, *overrides]))
    except (OSError, KeyError, ValueError) as error:
        raise CommandError(f"--config-file {config_file} cannot be used: {error}") from error


def find_pictures(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The pictures that files, folders (not those inside them) and patterns name, each once.

    Returns:
        Pictures, in the order of the inputs and by name within one; a sentence for each input without any.
    """
    found: dict[str, Path] = {}
    problems = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            problem = f"no pictures in the folder {text}"
        elif path.exists() or not glob.has_magic(text):
            paths = [path] if path.exists() else []
            problem = f"no such file: {text}"
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
            paths = sorted(p for p in map(Path, names) if p.is_file())
            problem = f"no file matches {text}"
        if not paths:
            problems.append(problem)
        for picture in paths:
            found.setdefault(os.path.realpath(picture), picture)
    return list(found.values()), problems


def output_paths(pictures: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """``<stem>.png`` in the folder for each picture; numbered where another picture or an input has that name."""
    taken = {_folded(picture) for picture in pictures}
    outputs = {}
    for picture in pictures:
        output, number = folder / f"{picture.stem}.png", 1
        while _folded(output) in taken:
            number += 1
            output = folder / f"{picture.stem}_{number}.png"
        taken.add(_folded(output))
        outputs[picture] = output
    return outputs


def summary(result: PictureResult) -> str:
    """What was found in a picture, in a few words."""
    from mask2former.predictor import InstancePicture, PanopticPicture

    if isinstance(result, PanopticPicture):
        return _listed("segment", _panoptic_words(result))
    if isinstance(result, InstancePicture):
        words = [f"{n} {s:.0%}" for n, s in zip(result.names, result.scores.tolist(), strict=True)]
        return _listed("instance", words)
    areas = np.bincount(result.labels.ravel(), minlength=len(result.names)) / result.labels.size
    order = np.argsort(-areas, kind="stable")
    words = [f"{result.names[i]} {areas[i]:.0%} of the area" for i in order[: np.count_nonzero(areas)]]
    return _listed("class", words)


def _panoptic_words(result: PanopticPicture) -> list[str]:
    by_score = sorted(result.segments, key=lambda segment: -segment.score)
    return [f"{segment.name} {segment.score:.0%}" for segment in by_score]


def _listed(noun: str, words: list[str]) -> str:
    plural = "" if len(words) == 1 else "es" if noun.endswith("s") else "s"
    if not words:
        return f"no {noun}{plural}"
    more = f", and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return f"{len(words)} {noun}{plural}: {', '.join(words[:_LISTED])}{more}"


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _folded(path: Path) -> str:
    """Equal for paths that may be one file, as on file systems that ignore case."""
    return os.path.realpath(path).casefold()


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.exit(main())

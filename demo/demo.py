"""Segments pictures and videos and draws the result: ``python demo/demo.py --input photo.jpg --output results``.

Exit codes: 0 all inputs done; 1 some could not be; 2 the command cannot be carried out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if str(_HERE) not in sys.path:  # it is where a program starts, but not where one is loaded
    sys.path.append(str(_HERE))
if importlib.util.find_spec("mask2former") is None:  # a checkout that is not installed
    sys.path.insert(0, str(_HERE.parent))

from demo_inputs import CommandError, Video, check_folder, find_inputs, is_video, names_a_file  # noqa: E402
from demo_models import BUNDLED, DEFAULT_MODEL, INSTANCE_THRESHOLD, Segmenter, load_segmenter  # noqa: E402
from demo_pictures import segment_pictures  # noqa: E402
from demo_results import Files, Results, Screen, plan_files  # noqa: E402
from demo_window import Gui, Window, WindowClosedError, system_gui  # noqa: E402


def main(arguments: Sequence[str] | None = None, *, gui: Gui | None = None) -> int:
    """Run the demo; returns the exit code.

    Args:
        arguments: of the command line; None: of this process.
        gui: opens windows; None: OpenCV.
    """
    args = _parse(arguments)
    if arguments is None:  # a process of its own
        from mask2former.training import keep_freed_memory

        keep_freed_memory()  # the next picture needs as much again
    try:
        return _run(args, gui)
    except (CommandError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "" if args.output is None else f"; the results in {args.output} so far are complete"
        print(f"demo: interrupted{kept}", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segments pictures, videos or what a camera sees, and draws the result over them.",
        epilog="Example: python demo/demo.py --input demo/pictures --output results",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="pictures, videos, folders of them, patterns such as 'photos/*.jpg'",
    )
    source.add_argument("--video-input", metavar="FILE", help="a video, whatever its name ends in")
    source.add_argument(
        "--webcam", nargs="?", const=0, type=int, metavar="INDEX", help="a camera, default the first one, 0"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder of the results; for one input also a picture or video file (default: a window shows them)",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="MODEL",
        help=f"model file, name of a published model, or a bundled one: {' or '.join(BUNDLED)} "
        f"(default: {DEFAULT_MODEL})",
    )
    model.add_argument("--config-file", type=Path, metavar="FILE", help="config instead; with --opts MODEL.WEIGHTS W")
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
    if args.webcam is not None and args.webcam < 0:
        parser.error(f"--webcam must be at least 0, got {args.webcam}")
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        parser.error(f"--confidence-threshold must be in [0, 1], got {threshold}")
    if threshold is not None and args.task == "semantic":
        parser.error("--confidence-threshold has no meaning for --task semantic, which labels every pixel")
    return args


def _run(args: argparse.Namespace, gui: Gui | None) -> int:
    pictures, videos, problems = _inputs(args)
    if args.output is not None and not names_a_file(args.output):
        check_folder(args.output, args.input)
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    if not pictures and not videos:
        return 1
    if args.output is not None:
        plan = plan_files(args.output, pictures, videos)
        is_complete = _segment(args, pictures, videos, lambda segmenter: Files(plan, segmenter))
    else:
        with Window(system_gui() if gui is None else gui) as window:
            is_complete = _segment(args, pictures, videos, lambda segmenter: Screen(window, segmenter))
    return 0 if is_complete and not problems else 1


def _inputs(args: argparse.Namespace) -> tuple[list[Path], list[Video], list[str]]:
    """Pictures, videos, and a sentence for each input without any."""
    if args.webcam is not None:
        return [], [args.webcam], []
    found, problems = find_inputs([args.video_input] if args.video_input is not None else args.input)
    pictures = [path for path in found if args.video_input is None and not is_video(path)]
    return pictures, [path for path in found if path not in pictures], problems


def _segment(
    args: argparse.Namespace,
    pictures: Sequence[Path],
    videos: Sequence[Video],
    make_results: Callable[[Segmenter], Results],
) -> bool:
    """Load the model and segment all inputs; says whether all could be done that the user wanted."""
    start = time.perf_counter()
    segmenter = load_segmenter(args)
    loaded = time.perf_counter()
    results = make_results(segmenter)
    try:
        done, seconds = segment_pictures(segmenter, pictures, results)
        each = f"{seconds / done:.2f} s a picture, " if done else ""
        done += sum([_segment_video(video, results) for video in videos])
    except WindowClosedError:
        return True
    if done:
        place = results.finish()
        now = time.perf_counter()
        print(f"Time: {loaded - start:.1f} s to load the model, {each}{now - start:.1f} s in all")
        print(place, end="\n" if place else "")
    return done == len(pictures) + len(videos)


def _segment_video(video: Video, results: Results) -> bool:
    try:
        return results.add_video(video)
    except (OSError, ValueError) as error:
        if isinstance(video, int):
            raise CommandError(f"--webcam cannot be used: {error}") from error
        print(f"demo: skipped {video}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.exit(main())

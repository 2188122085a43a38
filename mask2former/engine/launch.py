"""Training and evaluation from the command line with the embedded engine; `train_net.py` calls it."""

import argparse
import logging
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from mask2former.build import build_model
from mask2former.config import architecture_arguments, precision_arguments
from mask2former.data.catalog import UnknownDatasetError
from mask2former.engine.checkpoints import CheckpointFolder
from mask2former.engine.config import ConfigError, get_config
from mask2former.engine.evaluation import Results, evaluate, rank, world_size
from mask2former.engine.processes import is_launched, launch, launched_rank, make_fabric, say
from mask2former.engine.trainer import Trainer, TrainingInterrupted
from mask2former.engine.weights import load_for_evaluation
from mask2former.training import keep_freed_memory

logger = logging.getLogger(__name__)

# Where a process ends, the collectives of the others fail within milliseconds. These wait so many seconds before they
# end, in which the launcher, which looks each second, finds the first one and ends them: its failure is what is told.
_GRACE = 15.0

# Errors that can be for the user, see `_is_for_users`.
_TOLD = (ValueError, OSError, ModuleNotFoundError, UnknownDatasetError, FloatingPointError)


def parser() -> argparse.ArgumentParser:
    """The arguments, which are Detectron2's."""
    engines = "--engine auto|detectron2|embedded, before the others, chooses the engine."
    arguments = argparse.ArgumentParser(prog="train_net.py", description=__doc__, epilog=engines)
    arguments.add_argument("--config-file", metavar="FILE", default=None, help="YAML config")
    arguments.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    arguments.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    arguments.add_argument("--num-gpus", type=int, default=1, help="processes on this machine, one for each GPU")
    arguments.add_argument("--num-machines", type=int, default=1, help="number of machines")
    arguments.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    arguments.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; auto on one machine")
    arguments.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on all processes.

    Args:
        arguments: of the command line; None: the program's own.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    flags = [word for word in args.opts if word.startswith("--")]
    if flags:
        say(f"flags must stand before the first KEY VALUE, got {flags[0]} after {args.opts[0]}")
        return 2
    if is_launched() or args.num_gpus * args.num_machines <= 1:
        return run(words)
    try:
        get_config(args.config_file, args.opts)  # mistakes are told once, not by each process
        launch(
            run_launched,
            words,
            processes=args.num_gpus,
            machines=args.num_machines,
            machine=args.machine_rank,
            url=args.dist_url,
        )
    except ConfigError as error:
        say(str(error))
        return 1
    except (RendezvousError, DistError) as error:
        say(f"--dist-url: the processes did not find each other at {args.dist_url}: {error}")
        return 1
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # rank 0 has said how to go on
            return code
        say(_account_of(error))
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def run_launched(words: Sequence[str]) -> None:
    """`run` as one of several processes, which tells the launcher of a failure by its exit code."""
    code = run(words)
    if code:
        sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Train, or evaluate with ``--eval-only``, in this process; returns the exit code."""
    args = parser().parse_args(words)
    try:
        train_or_evaluate(get_config(args.config_file, args.opts), resume=args.resume, eval_only=args.eval_only)
    except TrainingInterrupted as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the same one may come again, passed on by the launcher
        if rank() == 0:
            command = words if args.resume else ["--resume", *words]
            say(f"{error}\nto go on: python train_net.py {shlex.join(command)}")
        return 128 + error.signum
    except KeyboardInterrupt:
        say("ended at once; --resume goes on from the last checkpoint")
        return 128 + signal.SIGINT
    except _TOLD as error:
        if sys.flags.dev_mode or not _is_for_users(error):
            raise
        if launched_rank() > 0:  # the first process finds the same mistakes, which are then told once
            time.sleep(_GRACE)
        say(f"{type(error).__name__}: {error}")
        return 1
    except RuntimeError:  # a lost connection is one, and has no type of its own
        if world_size() > 1:
            time.sleep(_GRACE)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train_or_evaluate(cfg: Any, *, resume: bool = False, eval_only: bool = False) -> Results | None:
    """Train or evaluate in this process.

    Returns:
        On the first process the results of the last evaluation, if there was one.
    """
    _configure(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if eval_only:
        return _evaluate_only(cfg, resume=resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train()


def _evaluate_only(cfg: Any, *, resume: bool) -> Results | None:
    architecture = architecture_arguments(cfg)
    fabric = make_fabric(cfg)
    folder = CheckpointFolder(cfg.OUTPUT_DIR)
    if rank() == 0:
        folder.check_writable()
    last = folder.last() if resume else None
    model = build_model(architecture, **precision_arguments(cfg))
    load_for_evaluation(model, str(last) if last else cfg.MODEL.WEIGHTS)
    return evaluate(cfg, model.to(fabric.device), with_tta=True)


def _configure(cfg: Any) -> None:
    """Settings of the process: messages, and how exact and fast PyTorch computes."""
    _log_to_console()
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION not in ("", "highest", "high", "medium"):
        raise ConfigError(
            f"FLOAT32_PRECISION must be '', 'highest', 'high' or 'medium', got {cfg.FLOAT32_PRECISION!r}"
        )
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)


class _Console(logging.Handler):
    """Prints to what is the program's output at that moment."""

    def emit(self, entry: logging.LogRecord) -> None:
        print(self.format(entry), flush=True)


def _log_to_console() -> None:
    package = logging.getLogger("mask2former")
    if not any(isinstance(handler, _Console) for handler in package.handlers):
        handler = _Console()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
        package.addHandler(handler)
    package.setLevel(logging.WARNING if launched_rank() else logging.INFO)


def _is_for_users(error: BaseException) -> bool:
    """Whether the message tells all.

    It does for the system's errors, and for what this package raises, also in a worker of a loader: PyTorch raises
    that again, with the worker's traceback in the message. A ValueError from elsewhere is a fault of a program.
    """
    if isinstance(error, OSError):
        return True
    places = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return places[-1] == "torch._utils" or places[-1].partition(".")[0] == "mask2former"


def _account_of(error: ChildFailedError) -> str:
    """Who failed, and how; the whole traceback stands above, in the launcher's log."""
    number, failure = error.get_first_failure()
    end = f"failed with exit code {failure.exitcode}" if failure.exitcode > 0 else f"died of {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        end += ", which is what the system sends when memory runs out"
    raised = failure.error_file_data["message"]  # a text if nothing was raised
    if isinstance(raised, dict):
        end += f", {raised['message']}"
    return f"rank {number} (process {failure.pid}) {end}; the other processes were ended"

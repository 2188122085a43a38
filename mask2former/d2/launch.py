"""Training and evaluation from the command line with Detectron2's engine; `train_net.py` calls it."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm

from mask2former import config
from mask2former.d2.config import get_config
from mask2former.d2.trainer import Trainer
from mask2former.training import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse Detectron2's usual arguments and run on all processes.

    Args:
        arguments: of the command line; None: the program's own.
    """
    args = default_argument_parser().parse_args(arguments)
    flags = [word for word in args.opts if word.startswith("--")]
    if flags:
        sys.exit(f"train_net.py: flags must stand before the first KEY VALUE, got {flags[0]} after {args.opts[0]}")
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def run(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, in this process.

    Returns:
        The results of the last evaluation, if there was one.
    """
    cfg = get_config(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if config.tta_arguments(cfg)["enabled"]:
            results.update(Trainer.test_with_TTA(cfg, model))
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    try:
        return trainer.train()
    except KeyboardInterrupt:
        if comm.is_main_process():
            print(f"\nInterrupted. --resume goes on from the last checkpoint in {cfg.OUTPUT_DIR}", file=sys.stderr)
        sys.exit(130)

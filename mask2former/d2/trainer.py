"""Detectron2's trainer with the core's optimizer, schedule, loader and evaluators."""

import logging
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from mask2former import config, solver, training
from mask2former.d2.data import build_test_loader, build_train_loader, register_datasets_of
from mask2former.d2.evaluation import LoaderWithProgress, build_evaluator
from mask2former.d2.tta import SemanticSegmentorWithTTA
from mask2former.d2.weights import StartCheckpointer, TrainingCheckpointer, class_names
from mask2former.modeling.mask2former import Mask2Former

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates a `MaskFormer`.

    With cfg.SEED >= 0 everything random in a step is a function of the seed and the iteration, so that a
    resumed training goes on exactly as if it had not been interrupted.
    """

    def __init__(self, cfg: Any) -> None:
        # not DefaultTrainer's own: it knows only its own steps, and distributes over GPUs only
        super(DefaultTrainer, self).__init__()
        _refuse_what_only_the_embedded_engine_does(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if config.run_arguments(cfg)["compile"]:
            model.compile()
        optimizer = self.build_optimizer(cfg, model)
        placement = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **placement)
        self._trainer = MaskFormerStep(model, self.build_train_loader(cfg), optimizer, cfg)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(
            model, cfg.OUTPUT_DIR, categories=class_names(cfg), trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """The model, after the data sets of DATASETS.CUSTOM were registered, for configs of other origin.

        Raises:
            ValueError: if the config describes another kind of model, which this trainer would train wrongly.
        """
        register_datasets_of(cfg)
        kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        if not (isinstance(kind, type) and issubclass(kind, Mask2Former)):
            raise ValueError(
                "MODEL.META_ARCHITECTURE must be a mask transformer such as 'MaskFormer', got "
                f"{cfg.MODEL.META_ARCHITECTURE!r}: does the config inherit from one in configs/?"
            )
        return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with one group for each pair of learning rate and weight decay."""
        optimizer = solver.make_optimizer(model, **config.optimizer_arguments(cfg))
        for group in optimizer.param_groups:
            logger.info(
                "%d tensors with learning rate %g and weight decay %g",
                len(group["params"]),
                group["lr"],
                group["weight_decay"],
            )
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """The learning-rate schedule."""
        factor = solver.lr_factor(**config.schedule_arguments(cfg))
        return LambdaLR(optimizer, [factor] * len(optimizer.param_groups))

    @classmethod
    def build_train_loader(cls, cfg: Any) -> DataLoader:
        """The training loader from its first batch on."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> LoaderWithProgress:
        """The test loader of a data set, which shows how far it is."""
        return LoaderWithProgress(build_test_loader(cfg, dataset_name), dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        """The evaluators of a data set."""
        return build_evaluator(cfg, dataset_name, str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name))

    @classmethod
    def test_with_TTA(cls, cfg: Any, model: nn.Module) -> dict[str, Any]:  # noqa: N802 - the published name
        """Evaluate with test-time augmentation; the outermost names of the results end in "_TTA"."""
        logger.info("Evaluating with test-time augmentation")
        folder = Path(cfg.OUTPUT_DIR) / "inference_TTA"
        evaluators = [build_evaluator(cfg, name, str(folder / name)) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, SemanticSegmentorWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks; the evaluation with TEST.AUG comes after the last plain one.

        Of the periodic checkpoints as many are kept as SOLVER.CHECKPOINTS_KEPT says.
        """
        every = super().build_hooks()
        for hook in every:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = config.run_arguments(self.cfg)["checkpoints_kept"]
        if config.tta_arguments(self.cfg)["enabled"]:
            plain = next(place for place, hook in enumerate(every) if isinstance(hook, hooks.EvalHook))
            every.insert(plain + 1, hooks.EvalHook(0, self._test_with_tta_and_save_results))
        return every

    def _test_with_tta_and_save_results(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**self._last_eval_results, **results}
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of the output folder, and the data go on where they stopped; or MODEL.WEIGHTS.

        Raises:
            ValueError: if MODEL.WEIGHTS do not fit, see `mask2former.finetune.load_start`.
        """
        if not (resume and self.checkpointer.has_checkpoint()):
            StartCheckpointer(self.model, self.cfg).load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            return
        super().resume_or_load(resume)
        logger.info("Resuming at iteration %d", self.start_iter)
        self._trainer.reset_data_loader(lambda: build_train_loader(self.cfg, self.start_iter))


class MaskFormerStep(SimpleTrainer):
    """One training step: accumulation, mixed precision, clipping, and what to do if the loss is not finite."""

    def __init__(self, model: nn.Module, data_loader: DataLoader, optimizer: torch.optim.Optimizer, cfg: Any) -> None:
        """Set up.

        Raises:
            ValueError: if a process has fewer images than SOLVER.ACCUMULATION_STEPS.
        """
        super().__init__(model, data_loader, optimizer)
        step = config.step_arguments(cfg)
        self.accumulation_steps, self.precision = step["accumulation_steps"], step["precision"]
        training.log_precision(self.precision)
        training.images_per_process(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), self.accumulation_steps)
        self.clip = config.clip_arguments(cfg)
        self.clips = self.clip.pop("enabled")
        self.device_type = torch.device(cfg.MODEL.DEVICE).type
        self.amp_dtype = None if step["amp_dtype"] is None else getattr(torch, step["amp_dtype"])
        # only half precision needs its loss scaled: bfloat16 has the range of float32
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=self.amp_dtype is torch.float16)
        self.seed = cfg.SEED
        self.skipped = training.SkippedSteps()

    def run_step(self) -> None:
        """Draw a batch, add up the gradients of its parts, clip, step.

        Raises:
            FloatingPointError: if the loss was not finite ten times in a row; single ones are skipped.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.seed >= 0:
            solver.seed_step(self.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        losses = _on_host(self._backward(batch))
        if self._skips(losses):
            return
        self._write_metrics(losses, data_time)
        get_event_storage().put_scalar("memory_mb", training.peak_memory_mb(self.device_type))
        self.grad_scaler.unscale_(self.optimizer)
        if self.clips:
            solver.clip_gradients(self.model.parameters(), **self.clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Mean losses over the parts of the batch, with their gradients in the parameters."""
        is_distributed = isinstance(self.model, DistributedDataParallel)
        return training.accumulate_gradients(
            batch,
            self.accumulation_steps,
            losses_of=self._losses,
            backward=lambda loss: self.grad_scaler.scale(loss).backward(),
            without_synchronisation=self.model.no_sync if is_distributed else nullcontext,
            precision=self.precision,
        )

    def _losses(self, part: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.model(part)

    def _skips(self, losses: dict[str, Tensor]) -> bool:
        """Whether any process has a loss that is not finite, so that this step must change nothing."""
        is_bad = not torch.isfinite(sum(losses.values())).item()
        is_finite = not any(comm.all_gather(is_bad))
        values = {} if is_finite else {name: loss.item() for name, loss in losses.items()}
        skips = self.skipped.skips(is_finite, self.iter, values)
        if skips:
            logger.warning("Iteration %d is skipped, its loss is not finite: %s", self.iter, values)
        return skips

    def state_dict(self) -> dict[str, Any]:
        """State of the loop, the optimizer and the loss scaler."""
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; checkpoints of Detectron2's own trainers may lack the scaler."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _on_host(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """All in one copy: Detectron2 would wait for each of them, to log it."""
    return dict(zip(losses, torch.stack(list(losses.values())).cpu(), strict=True))


def _refuse_what_only_the_embedded_engine_does(cfg: Any) -> None:
    settings = config.run_arguments(cfg)
    for key, name in (("SOLVER.EMA.ENABLED", "ema_decay"), ("LOGGING.WANDB_PROJECT", "wandb_project")):
        if settings[name] is not None:
            raise ValueError(f"{key} is on, which the embedded engine alone can follow: train_net.py --engine embedded")

"""The training loop."""

import logging
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mask2former import config, solver, training
from mask2former.build import build_model
from mask2former.checkpoint import load_weights
from mask2former.engine.checkpoints import CheckpointError, CheckpointFolder
from mask2former.engine.data import build_train_loader, class_names, dataset_entries
from mask2former.engine.evaluation import Results, check_evaluation, evaluate
from mask2former.engine.pictures import SamplePictures
from mask2former.engine.processes import make_fabric
from mask2former.engine.progress import TrainingLog
from mask2former.engine.step import StepResult, TrainingStep
from mask2former.engine.weights import load_start
from mask2former.engine.yaml_files import ConfigError
from mask2former.evaluation.reporting import flat, main_metric
from mask2former.finetune import OWN_ENTRY
from mask2former.modeling.mask2former import Mask2Former

logger = logging.getLogger(__name__)

_BEST = "model_best"
_SAME_PRESS = 3.0  # seconds in which a second signal is the first one, passed on by the launcher


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or a signal has ended the training, after its state was saved.

    Attributes:
        signum: the signal.
        checkpoint: name of the file to go on from.
    """

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; everything so far is in {checkpoint}")
        self.signum = signum
        self.checkpoint = checkpoint


class Trainer:
    """Trains and evaluates a model on the processes that there are; every one makes a trainer and calls the same.

    Everything random in a step is a function of the seed and the iteration, so that a resumed training goes on
    exactly as if it had not been interrupted. With SEED below 0 a seed is drawn and kept in the checkpoints.
    """

    def __init__(
        self, cfg: Any, fabric: Fabric | None = None, *, on_step: Callable[[int, StepResult], None] | None = None
    ) -> None:
        """Build model, optimizer and schedule.

        Args:
            cfg: from `get_config`.
            fabric: None: made for the config.
            on_step: sees the result of each iteration.

        Raises:
            ConfigError: if a key asks for what cannot be done here.
            ValueError: if the core refuses a value of the config.
        """
        architecture = config.architecture_arguments(cfg)
        check_evaluation(cfg)
        self.fabric = make_fabric(cfg) if fabric is None else fabric
        self.cfg = cfg = cfg.changed(config.scaled_to_processes(cfg, self.fabric.world_size))
        self.settings = config.run_arguments(cfg)
        self.is_main = self.fabric.global_rank == 0
        self.folder = CheckpointFolder(cfg.OUTPUT_DIR, kept=self.settings["checkpoints_kept"])
        if self.is_main:
            self.folder.prepare()
        drawn = self.fabric.broadcast(secrets.randbelow(2**31))
        self.seed: int = cfg.SEED if cfg.SEED >= 0 else drawn
        torch.manual_seed(self.seed)
        self.model: Mask2Former = build_model(architecture, **config.precision_arguments(cfg))
        if self.settings["compile"]:
            self.model.compile()
        optimizer = solver.make_optimizer(self.model, **config.optimizer_arguments(cfg))
        self.step = TrainingStep(cfg, self.fabric, self.model, optimizer)
        factor = solver.lr_factor(**config.schedule_arguments(cfg))
        self.scheduler = LambdaLR(optimizer, [factor] * len(optimizer.param_groups))
        self.ema = _average(self.model, self.settings["ema_decay"])
        self.class_names = class_names(cfg)
        self.start = 0
        self.max_iter: int = cfg.SOLVER.MAX_ITER
        self.best: tuple[str, float] | None = None  # name and value, in the first process
        self.last_results: Results | None = None
        self._on_step = on_step
        self._signal: tuple[int, float] | None = None
        self._saved_as: str | None = None  # while nothing would be lost: the checkpoint that has everything

    @property
    def evaluated_model(self) -> Mask2Former:
        """What is evaluated: the average of the weights over time if there is one."""
        return self.model if self.ema is None else self.ema.module

    def resume_or_load(self, *, resume: bool) -> None:
        """Load the last checkpoint of the output folder if that is wanted and there is one, or else MODEL.WEIGHTS.

        Raises:
            ConfigError: if the weights cannot be loaded, the checkpoint is of another model, or the processes do not
                see the same one.
            CheckpointError: if the checkpoint cannot be read.
        """
        last = self.folder.last() if resume else None
        self._check_that_all_see(last)
        if last is not None:
            self._load_state(self.folder.load(last), last)
            logger.info("Resuming %s at iteration %d", last, self.start)
            return
        if resume:
            logger.info("There is no checkpoint in %s: training starts anew", self.folder.folder)
        load_start(self.model, self.cfg)
        self.ema = _average(self.model, self.settings["ema_decay"])

    def train(self) -> Results | None:
        """Train to the last iteration, and evaluate.

        Returns:
            On the first process the results of the last evaluation, if there are test sets.

        Raises:
            TrainingInterrupted: after Ctrl-C or SIGTERM; the state is saved.
            CheckpointError: if a checkpoint cannot be written.
            FloatingPointError: if the loss is not finite ten times in a row.
        """
        loader = build_train_loader(
            self.cfg,
            seed=self.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            start_batch=self.start,
        )
        log = self._open_log() if self.is_main else None
        with self._signals():
            try:
                if self.start >= self.max_iter:
                    self._evaluate(self.max_iter - 1, _name_of(self.max_iter - 1, self.max_iter), log)
                else:
                    self._loop(iter(loader), log)
            finally:
                if log is not None:
                    log.close()
        return self.last_results

    def _check_that_all_see(self, last: Path | None) -> None:
        own = last.name if last else None
        first = self.fabric.broadcast(own)
        if own != first:
            raise ConfigError(
                f"OUTPUT_DIR must be one folder that all machines share, got {self.cfg.OUTPUT_DIR!r}: the last "
                f"checkpoint is {own} for process {self.fabric.global_rank} and {first} for process 0"
            )

    def _loop(self, batches: Iterator[Any], log: TrainingLog | None) -> None:
        self.model.train()
        for iteration in range(self.start, self.max_iter):
            begin = time.perf_counter()
            batch = next(batches)
            data_time = time.perf_counter() - begin
            result = self.step.run(batch, iteration, seed=self.seed, stop=self._signal is not None)
            if self.ema is not None and not result.skipped:
                self.ema.update_parameters(self.model)
            if log is not None:
                log.skip() if result.skipped else log.step(iteration, self._numbers(result, data_time))
            self.scheduler.step()
            if self._on_step is not None:
                self._on_step(iteration, result)
            self._after_step(iteration, result, log)

    def _after_step(self, iteration: int, result: StepResult, log: TrainingLog | None) -> None:
        is_last = iteration + 1 == self.max_iter
        evaluates = bool(self.cfg.DATASETS.TEST) and (is_last or _is_due(iteration, self.cfg.TEST.EVAL_PERIOD))
        is_saved = is_last or evaluates or result.stops or _is_due(iteration, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        name = _name_of(iteration, self.max_iter)
        if is_saved and self.is_main:
            self.folder.save(name, self.state(iteration))
            if log is not None:
                log.leave_out()
        if result.stops and (evaluates or not is_last):
            self.fabric.barrier()  # a process that ends makes the launcher end the others, and the first may be saving
            raise self._interruption(name)
        if evaluates:
            self._evaluate(iteration, name, log)

    def _numbers(self, result: StepResult, data_time: float) -> dict[str, float]:
        groups = self.step.optimizer.param_groups
        return {
            "total_loss": sum(result.losses.values()),
            **result.losses,
            "lr": max(groups, key=lambda group: len(group["params"]))["lr"],
            "data_time": data_time,
            "memory_mb": training.peak_memory_mb(self.fabric.device.type),
        }

    def _evaluate(self, iteration: int, saved_as: str, log: TrainingLog | None) -> None:
        """Evaluate; a signal ends that at once, for everything is in a checkpoint."""
        entries = dataset_entries(self.cfg, "DATASETS.TEST")
        if not entries:
            return
        watch = None
        if log is not None:
            folder = self.folder.folder / "predictions" / f"{iteration:07d}"
            watch = SamplePictures(folder, entries[0].metadata.categories, partial(log.picture, iteration))
        self._saved_as = saved_as
        if self._signal is not None:  # came after the processes had agreed to go on
            raise self._interruption(saved_as)
        is_last = iteration + 1 == self.max_iter
        self.last_results = evaluate(self.cfg, self.evaluated_model, watch=watch, with_tta=is_last)
        self._saved_as = None
        if self.last_results is not None and log is not None:
            self._keep_results(iteration, self.last_results, log)

    def _keep_results(self, iteration: int, results: Results, log: TrainingLog) -> None:
        found = main_metric(results)
        if found is not None and (self.best is None or found[0] != self.best[0] or found[1] > self.best[1]):
            self.best = found
            own = {"metric": list(found), "categories": self.class_names}
            state = {"model": self.evaluated_model.state_dict(), "iteration": iteration, OWN_ENTRY: own}
            self.folder.save(_BEST, state, is_last=False)
        log.results(iteration, flat(results))

    def state(self, iteration: int) -> dict[str, Any]:
        """Everything that a training needs to go on after an iteration, in the layout of Detectron2's trainer."""
        step = {
            "iteration": iteration,
            "optimizer": self.step.optimizer.state_dict(),
            "grad_scaler": {} if self.step.scaler is None else self.step.scaler.state_dict(),
        }
        own: dict[str, Any] = {"seed": self.seed, "categories": self.class_names}
        if self.ema is not None:
            own["ema"] = {"model": self.ema.module.state_dict(), "steps": int(self.ema.n_averaged)}
        return {
            "model": self.model.state_dict(),
            "trainer": {
                "iteration": iteration,
                "hooks": {"LRScheduler": self.scheduler.state_dict()},
                "_trainer": step,
            },
            "iteration": iteration,
            OWN_ENTRY: own,
        }

    def _load_state(self, content: Mapping[str, Any], path: Path) -> None:
        try:
            load_weights(self.model, content)
        except ValueError as error:
            raise ConfigError(f"the config must describe the model of {path}: {error}") from error
        if "trainer" not in content:
            raise ConfigError(
                f"{path} holds weights only, from which no training can be resumed; to start one from them: "
                f"MODEL.WEIGHTS {path}"
            )
        trainer, own = content["trainer"], content.get(OWN_ENTRY, {})
        step = trainer["_trainer"]
        try:
            self.step.optimizer.load_state_dict(step["optimizer"])
        except ValueError as error:
            raise ConfigError(f"SOLVER must have the parameter groups of {path}: {error}") from error
        if self.step.scaler is not None and step.get("grad_scaler"):
            self.step.scaler.load_state_dict(step["grad_scaler"])
        self.scheduler.load_state_dict(dict(trainer["hooks"]["LRScheduler"]))
        self.start = trainer["iteration"] + 1
        if self.cfg.SEED < 0:
            self.seed = own.get("seed", self.seed)
        self.best = self._best_so_far() if self.is_main else None
        self.ema = _average(self.model, self.settings["ema_decay"])
        if self.ema is not None and "ema" in own:
            load_weights(self.ema.module, own["ema"])
            self.ema.n_averaged.fill_(own["ema"]["steps"])

    def _best_so_far(self) -> tuple[str, float] | None:
        """From the file itself, which is newer than the last checkpoint if the training ended in between."""
        path = self.folder.folder / f"{_BEST}.pth"
        if not path.exists():
            return None
        try:
            metric = self.folder.load(path).get(OWN_ENTRY, {}).get("metric")
        except CheckpointError as error:
            logger.warning("The next evaluation replaces %s, which cannot be read: %s", path, error)
            return None
        return None if metric is None else (metric[0], metric[1])

    def _open_log(self) -> TrainingLog:
        (self.folder.folder / "config.yaml").write_text(self.cfg.dump(), encoding="utf-8")
        return TrainingLog(
            self.folder.folder,
            start=self.start,
            max_iter=self.max_iter,
            images_per_batch=self.cfg.SOLVER.IMS_PER_BATCH,
            wandb_project=self.settings["wandb_project"],
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the training after the step, or an evaluation; a second one ends it at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self._signal is None:
                self._signal = (signum, time.monotonic())
                if self._saved_as is not None:
                    raise self._interruption(self._saved_as)
            elif time.monotonic() - self._signal[1] > _SAME_PRESS:
                raise KeyboardInterrupt

        old = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)

    def _interruption(self, saved_as: str) -> TrainingInterrupted:
        signum = self._signal[0] if self._signal else signal.SIGTERM  # another process got it alone, so no Ctrl-C
        return TrainingInterrupted(signum, f"{saved_as}.pth")


def _name_of(iteration: int, max_iter: int) -> str:
    return "model_final" if iteration + 1 == max_iter else f"model_{iteration:07d}"


def _average(model: Mask2Former, decay: float | None) -> Any:
    """Keeps the exponential average of the weights; None without a decay."""
    if decay is None:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.module.requires_grad_(False)
    return average


def _is_due(iteration: int, period: int) -> bool:
    return period > 0 and (iteration + 1) % period == 0

"""The training step: this project, transformers' Mask2Former and a plain reference, in one run on the same input.

    python benchmarks/training_step.py --model tiny                         a step, at 512x512, two images, 20 objects
    python benchmarks/training_step.py --model r50 --repeats 3
    python benchmarks/training_step.py --model r50 --part loss              matching, sampling and losses only

Contestants take turns; each row has the median. They start from the same weights and see the same images and targets:

- here: this project as it trains.
- plain: its reference mode: plain PyTorch operations instead of the compiled kernels, mask logits of all layers, and
  the loss of benchmarks/plain_criterion.py.
- transformers: `Mask2FormerForUniversalSegmentation` from a configuration, with the same settings of the loss. Its
  batch is normalised, and its masks are float, before the clock starts. Batch statistics are frozen as they are here.

A step is forward pass, losses, backward pass, clipping of the whole gradient and AdamW. The part "loss" is what lies
between the decoder's embeddings of the queries and the losses, and back: mask logits, matching, sampling, losses.
Points are random, so that losses are compared as means over some draws; the program fails if these differ by more than
a hundredth.

"MiB" is the most memory that tensors have at a time, counted by PyTorch's allocator in one more run: weights,
gradients, the optimizer's state and all that a step makes. Images and targets are not counted.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import transformers_model
from benchmarks.plain_criterion import NewPoints, PlainCriterion
from mask2former import solver, training
from mask2former.build import Architecture, build_model, preset
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskPrediction, MaskTarget, QueryPrediction
from mask2former.ops import _extension

NAMES = ("here", "plain", "transformers")
CLASSES = 133
TOLERANCE = 0.01  # of the mean loss


def architecture(model: str) -> Architecture:
    """Published sizes, or those of configs/quick_schedules/Base-tiny.yaml; no stochastic depth, which is random."""
    if model != "tiny":
        layout = preset({"r50": "r50", "swin_t": "swin_tiny"}[model], num_classes=CLASSES)
        if model == "swin_t":
            layout["backbone"]["drop_path_rate"] = 0.0
        return layout
    layout = preset("swin_tiny", num_classes=CLASSES, num_queries=50)
    layout["backbone"] |= {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.0}
    layout["pixel_decoder"] |= {"conv_dim": 128, "mask_dim": 128, "num_layers": 2}
    sizes = {"in_channels": 128, "hidden_dim": 128, "mask_dim": 128, "dim_feedforward": 512, "num_layers": 3}
    layout["transformer_decoder"] |= sizes
    layout["criterion"] |= {"num_points": 2048}
    return layout


def make_targets(batch: int, objects: int, size: int) -> list[MaskTarget]:
    """Ellipses of any class, on top of each other."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    targets = []
    for _ in range(batch):
        centre, radius = (torch.rand(2, objects, 2, 1, 1, generator=generator)).unbind(0)
        radius = 0.03 + 0.2 * radius
        inside = ((x - centre[:, 0]) / radius[:, 0]) ** 2 + ((y - centre[:, 1]) / radius[:, 1]) ** 2 < 1  # (N, H, W)
        inside[:, size // 2, size // 2] = True  # none is empty
        targets.append(MaskTarget(torch.randint(CLASSES, (objects,), generator=generator), inside))
    return targets


class Step:
    """A training step of a model, which changes its weights."""

    def __init__(self, model: nn.Module, total_loss: Callable[[], Tensor], within: Callable[[], Any]) -> None:
        """Set up.

        Args:
            model: whose weights are trained.
            total_loss: forward pass and losses.
            within: makes the context of a step.
        """
        settings = {"weight_decay": 0.05, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0}
        self.optimizer = solver.make_optimizer(
            model, optimizer="ADAMW", base_lr=1e-4, momentum=0.9, backbone_multiplier=0.1, **settings
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.model, self.total_loss, self.within = model, total_loss, within
        self.last_loss = torch.zeros(())

    def run(self) -> None:
        """One step."""
        with self.within():
            self.optimizer.zero_grad()
            loss = self.total_loss()
            loss.backward()
            self.last_loss = loss.detach()  # looked at later, as the host would wait for a GPU
            solver.clip_gradients(self.parameters, type="full_model", value=0.01, norm_type=2.0)
            self.optimizer.step()

    def check(self) -> None:
        """End the program if the last loss is not finite."""
        if not self.last_loss.isfinite():
            sys.exit(f"the loss is {self.last_loss.item()}")

    def lasting_bytes(self) -> int:
        """Weights, gradients and the optimizer's state."""
        state = [x for entry in self.optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return bytes_of([*self.model.parameters(), *self.model.buffers(), *gradients, *state])

    def loss(self) -> float:
        """What is minimised, at new points."""
        with self.within(), torch.no_grad():
            return self.total_loss().item()


class LossPart:
    """Forward and backward pass of the losses of given predictions."""

    def __init__(self, leaves: Sequence[Tensor], total_loss: Callable[[], Tensor]) -> None:
        """Set up.

        Args:
            leaves: what wants a gradient.
            total_loss: from the leaves.
        """
        self.leaves, self.total_loss = leaves, total_loss

    def run(self) -> None:
        """Once."""
        self.total_loss().backward()
        for leaf in self.leaves:
            leaf.grad = None

    def lasting_bytes(self) -> int:
        """The predictions."""
        return bytes_of(self.leaves)

    def loss(self) -> float:
        """What is minimised, at new points."""
        with torch.no_grad():
            return self.total_loss().item()


Contestant = Step | LossPart


class Problem:
    """Images, targets and settings that all contestants share."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Make them."""
        self.layout = architecture(args.model)
        self.size, self.part = args.size, args.part
        self.canvas = (args.size, args.size)
        self.targets = make_targets(args.batch, args.objects, args.size)
        generator = torch.Generator().manual_seed(1)
        shape = (args.batch, 3, args.size, args.size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).unbind(0)

    def contestant(self, name: str) -> Contestant:
        """Build one of `NAMES`."""
        torch.manual_seed(2)
        model = build_model(self.layout)
        criterion = self._criterion(name, model)
        if self.part == "loss":
            return self._loss_part(name, criterion)
        if name == "transformers":
            return self._step_of_transformers(model)
        within: Callable[[], AbstractContextManager[Any]] = nullcontext
        if name == "here":
            return Step(model, lambda: training.sum_of(model.losses(self.images, self.targets)), within)
        return Step(
            model,
            lambda: criterion(model.predict(model.batch_images(self.images), all_layers=True)),
            _extension.reference_only,
        )

    def _criterion(self, name: str, model: Mask2Former) -> Callable[[Any], Tensor]:
        """Predictions to the total loss."""
        own = model.criterion
        if name == "here":
            return lambda predictions: training.sum_of(own.weighted(own(predictions, self.targets, self.canvas)))
        if name == "plain":
            plain = PlainCriterion(num_classes=CLASSES, num_points=own.num_points)
            points = NewPoints()
            return lambda p: training.sum_of(own.weighted(plain(p, self.targets, self.canvas, points)))
        theirs = training_peer(self.layout, model)
        masks, labels = [t.masks.float() for t in self.targets], [t.labels for t in self.targets]

        def loss(predictions: list[MaskPrediction]) -> Tensor:
            *earlier, last = [
                {"masks_queries_logits": p.mask_logits, "class_queries_logits": p.class_logits} for p in predictions
            ]
            return theirs.get_loss(
                theirs.get_loss_dict(**last, mask_labels=masks, class_labels=labels, auxiliary_predictions=earlier)
            )

        return loss

    def _loss_part(self, name: str, criterion: Callable[[Any], Tensor]) -> LossPart:
        """From random embeddings and smooth mask features."""
        decoder = self.layout["transformer_decoder"]
        B, Q, C = len(self.images), decoder["num_queries"], decoder.get("mask_dim", 256)
        layers, side = decoder.get("num_layers", 9) + 1, self.size // 4
        coarse = torch.randn(B, C, max(1, side // 8), max(1, side // 8))
        features = F.interpolate(coarse, (side, side), mode="bilinear").mul_(5 * C**-0.5).requires_grad_()
        class_logits = torch.randn(layers, B, Q, CLASSES + 1).requires_grad_()
        embeddings = torch.randn(layers, B, Q, C).requires_grad_()

        def total_loss() -> Tensor:
            layers = zip(class_logits, embeddings, strict=True)
            predictions = [QueryPrediction(logits, embedding, features) for logits, embedding in layers]
            return criterion(predictions if name == "here" else [p.with_masks for p in predictions])

        return LossPart([class_logits, embeddings, features], total_loss)

    def _step_of_transformers(self, model: Mask2Former) -> Step:
        theirs = training_peer(self.layout, model)
        batch = model.batch_images(self.images)
        masks, labels = [t.masks.float() for t in self.targets], [t.labels for t in self.targets]
        return Step(
            theirs, lambda: theirs(pixel_values=batch, mask_labels=masks, class_labels=labels).loss.sum(), nullcontext
        )


def training_peer(layout: Architecture, model: Mask2Former) -> Any:
    """Transformers' model in training mode with the weights of ours, and statistics frozen as ours are."""
    theirs = transformers_model(layout, model).train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return theirs


def peak_bytes(contestant: Contestant) -> int:
    """Most bytes of tensors at a time: those that stay, and what the allocator handed out on top in one more run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.run()
    on_top = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            on_top += event.nbytes()
            highest = max(highest, on_top)
    return contestant.lasting_bytes() + highest


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compare_losses(contestants: dict[str, Contestant], draws: int) -> None:
    """Print mean losses; end the program if they differ."""
    found = {name: [contestant.loss() for _ in range(draws)] for name, contestant in contestants.items()}
    means = {name: statistics.mean(losses) for name, losses in found.items()}
    print(f"mean loss of {draws} draws: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    if max(means.values()) - min(means.values()) > TOLERANCE * min(means.values()):
        sys.exit(f"losses differ by more than {TOLERANCE:.0%}: {found}")


def timed(contestants: dict[str, Contestant], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median ms of each, in turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, contestant in contestants.items():
            start = clock()
            contestant.run()
            if turn:
                seconds[name].append(clock() - start)
            if isinstance(contestant, Step):
                contestant.check()
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", choices=("tiny", "r50", "swin_t"), default="tiny")
    arguments.add_argument("--part", choices=("step", "loss"), default="step")
    arguments.add_argument("--size", type=int, default=512, help="height and width of the images, a multiple of 32")
    arguments.add_argument("--batch", type=int, default=2, help="images")
    arguments.add_argument("--objects", type=int, default=20, help="of each image")
    arguments.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="contestants")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--keep-memory", action="store_true", help="malloc keeps what is freed, as in train_net.py")
    arguments.add_argument("--draws", type=int, default=3, help="of the comparison of losses; 0: none")
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine in use")
    return arguments


def main() -> None:
    """Print the table."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_memory and not training.keep_freed_memory():
        sys.exit("--keep-memory needs glibc, without settings of malloc in the environment")
    problem = Problem(args)
    contestants = {name: problem.contestant(name) for name in args.only}
    kept = ", freed memory kept" if args.keep_memory else ""
    print(
        f"{platform.machine()}, {args.threads} threads, PyTorch {torch.__version__}; {args.model}, {args.part}, "
        f"{args.batch} images of {args.size}x{args.size} with {args.objects} objects{kept}; {_extension.describe()}"
    )
    if args.draws:
        compare_losses(contestants, args.draws)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    found = timed(contestants, args.repeats, clock)
    memory = {name: peak_bytes(contestant) / 2**20 for name, contestant in contestants.items()}
    first = next(iter(found))
    print(f"\n| contestant | ms ({args.clock}) | times {first} | MiB | part of it that {first} takes |")
    print("|---|---|---|---|---|")
    for name, ms in found.items():
        share = memory[first] / memory[name]
        print(f"| {name} | {ms:.1f} | {ms / found[first]:.2f} | {memory[name]:.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()

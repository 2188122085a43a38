"""How often a step of the engine makes the host wait for a GPU, counted on a pretended one."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.host_waits import PretendedGPU
from mask2former import config, solver
from mask2former.build import build_model
from mask2former.data import MappedSample
from mask2former.engine.step import TrainingStep
from tests.tiny import random_image, random_target


class OneProcess:
    """What a step needs of Fabric on one device, without asking for that device."""

    world_size, global_rank = 1, 0
    strategy = SimpleNamespace(precision=None)

    def setup(self, module, optimizer):
        return module, optimizer

    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_waits_for_each_matching_and_once_for_its_losses(tiny, parts):
    cfg = tiny.cfg(SOLVER__ACCUMULATION_STEPS=parts)
    model = build_model(config.architecture_arguments(cfg))
    classes = model.criterion.num_classes
    with PretendedGPU() as gpu:
        model.to("cuda")
        step = TrainingStep(cfg, OneProcess(), model, solver.make_optimizer(model, **config.optimizer_arguments(cfg)))
        for iteration in range(2):
            images = [random_image(64, 64).pin_memory().to("cuda", non_blocking=True) for _ in range(2)]
            batch = [MappedSample(image, random_target(3, 64, 64, classes)) for image in images]
            gpu.clear()
            result = step.run(batch, iteration, seed=1)
            assert not result.skipped
            # the costs of each part to the matcher; all losses, and whether they are finite, before weights change
            assert gpu.waits == {"copy to the host": parts + 1}
    assert torch.tensor(list(result.losses.values())).isfinite().all()

"""The core's count of operations against fvcore's, where the two know the same operators."""

import pytest
import torch

pytest.importorskip("fvcore", reason="fvcore is not installed")

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

from mask2former.analysis.operations import count_operations
from mask2former.build import build_model
from tests import tiny

FUSED = "aten::scaled_dot_product_attention"  # which fvcore does not know


def attention_flops(inputs, outputs):
    (B, M, Q, C), (_, _, S, _), (_, _, _, D) = (value.type().sizes() for value in inputs[:3])
    return B * M * Q * S * (C + D)


def attention_activations(inputs, outputs):
    (B, M, Q, _), (_, _, S, _), (_, _, _, D) = (value.type().sizes() for value in inputs[:3])
    return B * M * Q * (S + D)


class AllLayers(torch.nn.Module):
    """Swin, so that no norm is written in operators that fvcore does not count."""

    def __init__(self):
        super().__init__()
        self.model = build_model(tiny.architecture()).eval()

    def forward(self, batch):
        return self.model(batch, True)


def test_a_whole_model():
    model, batch = AllLayers(), torch.rand(1, 3, 64, 96)
    flops = FlopCountAnalysis(model, batch).set_op_handle(FUSED, attention_flops)
    activations = ActivationCountAnalysis(model, batch).set_op_handle(FUSED, attention_activations)
    ours = count_operations(model.model, (64, 96), all_layers=True)
    # fvcore sees deformable attention sample, 64 channels of 3 levels in 2 points, but not weight
    cells = 8 * 12 + 4 * 6 + 2 * 3
    weighting = cells * 64 * 3 * 2
    for counter in (flops, activations):
        counter.unsupported_ops_warnings(False)
    assert ours.flops[""].total() - weighting == pytest.approx(flops.total(), rel=1e-4)
    assert ours.activations[""] == activations.total()

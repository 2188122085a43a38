"""The training loader of the embedded engine: the same samples whatever the workers, and all of them can be pinned."""

from itertools import islice

import torch
from torch.utils.data._utils.pin_memory import pin_memory

from mask2former.engine.data import build_train_loader


def batches(cfg, count=3, **arguments):
    loader = iter(build_train_loader(cfg, seed=1, **arguments))
    return list(islice(loader, count))


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.target.objects, other.target.objects)
        assert torch.equal(one.target.maps, other.target.maps)


def test_workers_draw_what_one_process_draws(tiny):
    """Augmentation depends on seed and position: neither on the worker nor on what it has drawn before."""
    expected = batches(tiny.cfg())
    for found, wanted in zip(batches(tiny.cfg(DATALOADER__NUM_WORKERS=2)), expected, strict=True):
        assert_equal(found, wanted)
    (resumed,) = batches(tiny.cfg(DATALOADER__NUM_WORKERS=1), count=1, start_batch=2)
    assert_equal(resumed, expected[2])
    images = [sample.image for batch in expected for sample in batch]  # of four records: two of them twice
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_samples_cross_processes_as_label_maps(tiny):
    """A map of bytes an image, however many segments it has, and masks of the same pixels when they are asked for."""
    for sample in batches(tiny.cfg(DATALOADER__NUM_WORKERS=1), count=1)[0]:
        assert sample.target.maps.shape == (1, 64, 64)
        assert len(sample.target.labels) > 1
        assert sample.target.masks.shape == (len(sample.target.labels), 64, 64)
        assert sample.target.masks.flatten(1).any(dim=1).all()


def test_all_tensors_of_a_batch_can_be_pinned(tiny, monkeypatch):
    """What PyTorch's loader does in its thread, with a stand-in for the copy, which needs a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    (batch,) = batches(tiny.cfg(), count=1)
    assert_equal(pin_memory(batch), batch)
    assert len(pinned) == 3 * len(batch)

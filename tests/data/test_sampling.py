"""The order of training: a function of seed and position."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mask2former.data import MappedDataset, MappedSample, TrainingBatchSampler
from mask2former.data.sampling import RecordError
from mask2former.modeling.structures import MaskTarget

RATIOS = [1.5, 0.7, 1.0, 1.3, 0.5, 2.0, 1.1]


def taken(count, **changes):
    arguments = {"num_records": 7, "batch_size": 3, "seed": 4, **changes}
    return list(islice(TrainingBatchSampler(**arguments), count))


def test_each_epoch_is_another_permutation():
    items = [item for batch in taken(14) for item in batch]
    assert [position for _, position in items] == list(range(42))
    epochs = [[index for index, _ in items[start : start + 7]] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_same_seed_same_batches():
    assert taken(9) == taken(9)
    assert taken(9) != taken(9, seed=5)
    sampler = TrainingBatchSampler(num_records=7, batch_size=3, seed=4)
    assert list(islice(sampler, 5)) == list(islice(sampler, 5))


@pytest.mark.parametrize("ratios", [None, RATIOS])
@pytest.mark.parametrize("ranks", [{}, {"rank": 1, "world_size": 3}])
def test_start_batch_skips(ratios, ranks):
    whole = taken(30, aspect_ratios=ratios, **ranks)
    for start in (0, 1, 7, 19):
        assert taken(11, aspect_ratios=ratios, start_batch=start, **ranks) == whole[start : start + 11]


def test_far_start_is_immediate():
    far = taken(1, num_records=1000, batch_size=16, start_batch=10**9)
    assert [position for _, position in far[0]] == list(range(16 * 10**9, 16 * 10**9 + 16))


@pytest.mark.parametrize("ratios", [None, RATIOS])
def test_ranks_share_the_sequence(ratios):
    items = [
        item
        for rank in range(2)
        for batch in taken(40, rank=rank, world_size=2, aspect_ratios=ratios)
        for item in batch
    ]
    assert len(set(items)) == len(items) == 240
    one = {position: index for batch in taken(100) for index, position in batch}
    assert all(one[position] == index for index, position in items if position in one)
    if ratios is None:
        assert sorted(position for _, position in items) == list(range(240))


def test_grouping_never_mixes_and_loses_nothing():
    batches = taken(50, aspect_ratios=RATIOS)
    assert all(len({RATIOS[index] > 1 for index, _ in batch}) == 1 for batch in batches)
    assert {RATIOS[batch[0][0]] > 1 for batch in batches} == {True, False}
    positions = sorted(position for batch in batches for _, position in batch)
    assert len(set(positions)) == 150
    # At most batch_size - 1 images of each kind wait for their batch.
    assert len(set(range(positions[-1] + 1)) - set(positions)) <= 4
    for is_wide in (True, False):
        kind = [p for b in batches if (RATIOS[b[0][0]] > 1) is is_wide for _, p in b]
        assert kind == sorted(kind)


def test_more_ranks_than_records():
    batches = [taken(4, num_records=1, batch_size=1, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(p for rank in batches for ((_, p),) in rank) == list(range(16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_records": 0}, "num_records must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start_batch": -1}, "start_batch must be at least 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\), got 2"),
        ({"aspect_ratios": [1.0]}, "one entry for each of the 7 records, got 1"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        taken(1, **changes)


def draw(record, rng):
    """A mapper at module level, so that worker processes can get it."""
    if record.get("broken"):
        raise ValueError("no such thing")
    image = torch.full((3, 1, 1), record["value"], dtype=torch.uint8)
    labels = torch.tensor([int(rng.integers(10**9))])
    return MappedSample(image, MaskTarget(labels, torch.ones(1, 1, 1, dtype=torch.bool)))


RECORDS = [{"file_name": f"{n}.jpg", "value": n} for n in range(7)]


def loaded(workers, start_batch, count):
    sampler = TrainingBatchSampler(num_records=7, batch_size=3, seed=4, start_batch=start_batch)
    loader = DataLoader(
        MappedDataset(RECORDS, draw, 4), batch_sampler=sampler, num_workers=workers, collate_fn=list
    )
    batches = islice(loader, count)
    return [[(int(s.image[0, 0, 0]), int(s.target.labels[0])) for s in batch] for batch in batches]


def test_a_resumed_loader_goes_on_exactly_whatever_the_workers():
    whole = loaded(0, 0, 8)
    assert loaded(0, 5, 3) == whole[5:]
    assert loaded(2, 5, 3) == whole[5:]
    assert len({draws for batch in whole for _, draws in batch}) == 24


def test_random_numbers_depend_on_seed_and_position_alone():
    def label(seed, position):
        return int(MappedDataset(RECORDS, draw, seed)[0, position].target.labels[0])

    assert label(4, 11) == label(4, 11) == int(np.random.default_rng([4, 11]).integers(10**9))
    assert len({label(4, 11), label(4, 12), label(5, 11)}) == 3
    with pytest.raises(ValueError, match="seed must be at least 0"):
        MappedDataset(RECORDS, draw, -1)


def test_errors_name_the_file():
    dataset = MappedDataset([{"file_name": "bad.jpg", "broken": True}], draw, 0)
    assert len(dataset) == 1
    with pytest.raises(RecordError, match=r"record 0 \(bad.jpg\) at position 3: ValueError: no such thing"):
        dataset[0, 3]


def test_errors_pass_worker_processes():
    dataset = MappedDataset([{"file_name": "bad.jpg", "broken": True}], draw, 0)
    loader = DataLoader(dataset, batch_sampler=[[(0, 0)]], num_workers=1, collate_fn=list)
    with pytest.raises(RecordError, match=r"bad\.jpg"):
        next(iter(loader))

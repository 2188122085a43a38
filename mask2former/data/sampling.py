"""Which images a training step sees, and with which random numbers.

Everything is a function of the seed and the position in one endless sequence, so that a resumed training
goes on as if it had not been interrupted, whatever the number of workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from mask2former.data.mapper import MappedSample
from mask2former.data.records import Record

RecordMapper = Callable[[Mapping[str, Any], np.random.Generator], MappedSample]

# Third word of the seed, so that an epoch's order and the augmentation at a position of the same number
# do not come from the same stream.
_ORDER_STREAM = 1


class TrainingBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (record index, position).

    The sequence is one permutation of all records after the other; a position counts along it. Rank r takes
    the positions r, r + world_size, ... of it.

    Args:
        num_records: length of the data set.
        batch_size: images in a batch of this rank.
        seed: same on all ranks.
        rank: of this process.
        world_size: number of processes.
        aspect_ratios: width / height of every record. If given, a batch has either only images with a ratio
            above 1 or only others; images wait until their batch is full.
        start_batch: number of batches to skip; the rest is as if they had been taken.
    """

    def __init__(
        self,
        *,
        num_records: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        aspect_ratios: Sequence[float] | None = None,
        start_batch: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_records", num_records, 1), ("batch_size", batch_size, 1), ("seed", seed, 0),
            ("world_size", world_size, 1), ("start_batch", start_batch, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        if aspect_ratios is not None and len(aspect_ratios) != num_records:
            raise ValueError(
                f"aspect_ratios must have one entry for each of the {num_records} records, "
                f"got {len(aspect_ratios)}"
            )
        self.num_records = num_records
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.is_wide = None if aspect_ratios is None else [ratio > 1 for ratio in aspect_ratios]
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.is_wide is not None:
            return islice(self._grouped(self.is_wide), self.start_batch, None)
        return self._plain()

    def _plain(self) -> Iterator[list[tuple[int, int]]]:
        stream = self._from(self.start_batch * self.batch_size)
        while True:
            yield list(islice(stream, self.batch_size))

    def _grouped(self, is_wide: list[bool]) -> Iterator[list[tuple[int, int]]]:
        waiting: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for item in self._from(0):
            group = waiting[is_wide[item[0]]]
            group.append(item)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()

    def _from(self, taken: int) -> Iterator[tuple[int, int]]:
        """(record index, position) of this rank after it has taken so many."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for position in count(self.rank + taken * self.world_size, self.world_size):
            if position // self.num_records != epoch:
                epoch = position // self.num_records
                order = self._order(epoch)
            yield int(order[position % self.num_records]), position

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch, _ORDER_STREAM])
        return rng.permutation(self.num_records)


class MappedDataset(Dataset[MappedSample]):
    """Records mapped on access. An item is asked for by a (record index, position) of the sampler; the
    position fixes the random numbers of its augmentation.

    Args:
        records: the data set.
        mapper: called with a record and a generator.
        seed: same on all ranks.
    """

    def __init__(self, records: Sequence[Record], mapper: RecordMapper, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> MappedSample:
        """
        Raises:
            RecordError: the mapper refuses the record; the message names its image file.
        """
        index, position = item
        record = self.records[index]
        try:
            return self.mapper(record, np.random.default_rng([self.seed, position]))
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            raise RecordError(
                f"record {index} ({record.get('file_name')}) at position {position}: "
                f"{type(error).__name__}: {error}"
            ) from error


class RecordError(ValueError):
    """A record that could not be mapped. One argument, so that it passes between worker processes."""

"""Which samples an update sees, and the seeds of its draws: pure functions of the seed and the position.

The samples of a run are one endless stream of permutations of the data set. Update u reads positions
[u B, (u + 1) B) of it; processes and accumulation cut that range, so neither changes what an update sees.
"""

import hashlib
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

__all__ = ["Place", "SampleStream", "SeededDataset", "derive_seed", "make_loader", "sample_seeds", "seed_all"]

# Purposes of derived seeds: two purposes never share a random stream.
ORDER, DATA, STEP, SAMPLE = range(4)


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed that is a fixed function of ``seed`` and ``path``."""
    packed = struct.pack(f"<{1 + len(path)}q", seed, *path)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, numpy and torch (on the CPU and on ``device``)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed formats a stack trace while CUDA is not initialised: 130 us against 1 us.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class Place(NamedTuple):
    position: int  # in the stream
    index: int  # in the data set


def sample_seeds(seed: int, places: Sequence[Place]) -> torch.Tensor:
    """Seeds (len(places),) int64 >= 0 for what a model draws for each sample: fixed by seed and position."""
    return torch.tensor([derive_seed(seed, SAMPLE, place.position) >> 1 for place in places])


class SampleStream:
    """A batch sampler: a list of `Place` for each micro-batch of this process, updates ``start`` to ``stop``.

    Args:
        samples: length of the data set.
        batch_size: samples of one update over all processes and micro-batches.
        accumulate: micro-batches of one update.

    Raises:
        ValueError: the data set is empty or the batch does not divide.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        if samples < 1:
            raise ValueError("the data set holds no sample")
        if batch_size % (world * accumulate):
            raise ValueError(
                f"train.batch_size is {batch_size}, which {world} processes x {accumulate} accumulated "
                "micro-batches do not divide"
            )
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.start, self.stop, self.accumulate, self.rank, self.world = start, stop, accumulate, rank, world
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        for update in range(self.start, self.stop):
            for micro in range(self.accumulate):
                yield self.places(update, micro)

    def places(self, update: int, micro: int) -> list[Place]:
        """What this process reads for one micro-batch."""
        size = self.batch_size // (self.world * self.accumulate)
        first = update * self.batch_size + (micro * self.world + self.rank) * size
        return [Place(p, self.index(p)) for p in range(first, first + size)]

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, self.samples)
        return int(self.order(epoch)[offset])

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, (samples,) int64."""
        if epoch not in self._orders:
            # Raw PCG64 output is fixed for ever; Generator.permutation may change with numpy's version.
            draws = np.random.PCG64(derive_seed(self.seed, ORDER, epoch)).random_raw(self.samples)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.argsort(draws, kind="stable")
        return self._orders[epoch]


class SeededDataset(Dataset):
    """Fetches `Place`s of a data set with the global generators seeded by position.

    Augmentation drawn in ``__getitem__`` is then the same for any number of workers or processes, and after a
    resume. A data set that offers ``__getitems__`` is seeded once a fetch.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, places: Sequence[Place]) -> Any:
        many = getattr(self.dataset, "__getitems__", None)
        if many is not None:
            seed_all(derive_seed(self.seed, DATA, places[0].position))
            return many([place.index for place in places])
        fetched = []
        for place in places:
            seed_all(derive_seed(self.seed, DATA, place.position))
            fetched.append(self.dataset[place.index])
        return fetched


def collate_or_pass(fetched: Any) -> Any:
    """Torch's default collation; a whole batch that ``__getitems__`` made passes through."""
    return fetched if isinstance(fetched, Mapping) else default_collate(fetched)


def make_loader(
    dataset: Dataset,
    stream: SampleStream,
    *,
    collate: Callable[[Any], Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader that yields the micro-batches of ``stream`` in order."""
    return DataLoader(
        SeededDataset(dataset, stream.seed),
        batch_sampler=stream,
        collate_fn=collate or collate_or_pass,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader's own draw must not move the global generator
    )

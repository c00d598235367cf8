"""Frames of an uncompressed HDF5 array, read straight from their place in the file.

HDF5 looks a name up, takes its lock and builds objects for every read; for a random frame that costs more
than its bytes do. An array that lies in one piece needs none of it.
"""

import os
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Block", "find_block"]


class Block(NamedTuple):
    """An array (T, ...) at ``offset`` bytes from the start of its file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def announce(self, descriptor: int, start: int, stop: int) -> None:
        """Let the system begin to read these rows, so that many reads wait for the disk together."""
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        begin, length = self.offset + start * size, (stop - start) * size
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_WILLNEED)

    def read(self, descriptor: int, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1`` in one read of an open file; OSError where it ends before them."""
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if not 0 <= start < stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self.shape[0]}")
        frames = np.empty((stop - start, *self.shape[1:]), self.dtype)
        got = os.preadv(descriptor, [memoryview(frames).cast("B")], self.offset + start * size)
        if got != frames.nbytes:
            raise OSError(f"the file ends within rows {start} to {stop}")
        return frames


def find_block(stored: Any, descriptor: int) -> Block | None:
    """Where an h5py data set lies; None when it is not in one piece of its file, as plain native numbers."""
    offset = stored.id.get_offset()
    if offset is None or stored.chunks is not None or stored.external or 0 in stored.shape:
        return None
    if not stored.dtype.isnative or stored.dtype.hasobject:
        return None
    block = Block(offset, stored.shape, stored.dtype)
    try:  # the address is right, whatever lies before it in the file
        return block if np.array_equal(block.read(descriptor, 0, 1)[0], stored[0], equal_nan=True) else None
    except OSError:
        return None

"""The sample stream: every sample once an epoch, whatever the cut into processes and micro-batches."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from vilma.training.sampling import SampleStream, derive_seed, make_loader, seed_all


def indices(**options):
    stream = SampleStream(13, 6, 5, **({"stop": 20} | options))
    return [[place.index for place in places] for places in stream]


def test_epochs_are_permutations_and_differ():
    flat = [i for batch in indices() for i in batch]
    epochs = [flat[k : k + 13] for k in range(0, 13 * 9, 13)]
    assert all(Counter(epoch) == Counter(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9
    assert indices() == indices() and [i for b in indices() for i in b][:13] != list(range(13))


def test_order_is_close_to_uniform():
    """Each sample's mean place over many epochs is the middle: a biased shuffle would show."""
    stream = SampleStream(8, 8, 0, stop=1)
    places = np.stack([np.argsort(stream.order(e)) for e in range(4000)])
    assert np.abs(places.mean(0) - 3.5).max() < 5 * np.sqrt(63 / 12 / 4000)


def test_resuming_continues_the_stream():
    assert indices(start=7) == indices()[7:]


def test_processes_and_micro_batches_cut_the_same_updates():
    whole = indices()
    ranks = [indices(rank=r, world=3) for r in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks)] == whole
    micro = indices(accumulate=2)
    assert [a + b for a, b in zip(micro[::2], micro[1::2])] == whole
    both = [indices(accumulate=3, rank=r, world=2) for r in range(2)]
    joined = [list(chain(*(both[r][3 * u + m] for m in range(3) for r in range(2)))) for u in range(20)]
    assert joined == whole


def test_a_batch_larger_than_the_data_set():
    stream = SampleStream(3, 7, 0, stop=3)
    assert Counter(i.index for b in stream for i in b) == Counter({0: 7, 1: 7, 2: 7})


@pytest.mark.parametrize("samples, options", [(0, {}), (5, {"world": 4}), (5, {"accumulate": 5})])
def test_impossible_streams_are_errors(samples, options):
    with pytest.raises(ValueError):
        SampleStream(samples, 6, 0, stop=1, **options)


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        import random

        return {
            "index": index,
            "draws": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]),
        }


class DrawingBatches(Drawing):
    def __getitems__(self, indices):
        return {"index": torch.tensor(indices), "draws": torch.rand(len(indices))}


def batches(dataset, **options):
    stream_options = {k: options.pop(k) for k in ("start", "rank", "world") if k in options}
    stream = SampleStream(len(dataset), 4, 3, stop=6, **stream_options)
    return [{k: v.clone() for k, v in b.items()} for b in make_loader(dataset, stream, **options)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in ("index", "draws"))


@pytest.mark.parametrize("dataset", [Drawing(), DrawingBatches()])
def test_draws_do_not_depend_on_workers_or_restarts(dataset):
    whole = batches(dataset)
    torch.manual_seed(99)
    assert same(batches(dataset), whole)
    assert same(batches(dataset, num_workers=2), whole)
    assert same(batches(dataset, start=2), whole[2:])
    draws = torch.cat([b["draws"].flatten() for b in whole])
    assert len(draws.unique()) == len(draws)


def test_draws_of_a_sample_do_not_depend_on_the_process():
    whole, ranks = batches(Drawing()), [batches(Drawing(), rank=r, world=2) for r in range(2)]
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*ranks)]
    assert same(joined, whole)


def test_seeds_are_distinct_and_fixed():
    assert len({derive_seed(s, p, n) for s in range(10) for p in range(3) for n in range(100)}) == 3000
    assert derive_seed(0, 1, 2) == 0x7B88B61124DB5DCF
    seed_all(derive_seed(0, 1, 2))
    first = torch.rand(3)
    seed_all(derive_seed(0, 1, 2))
    assert torch.equal(torch.rand(3), first)

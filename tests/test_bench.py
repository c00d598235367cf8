"""Timing: known ratios come out, contenders take turns, what is kept is counted to the byte."""

import contextlib
import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch

from vilma import bench
from vilma.bench import BOTH, FORWARD, Contender, Timing


def work(times: int, size: int = 160):
    x = torch.randn(size, size)

    def run():
        for _ in range(times):
            torch.mm(x, x)

    return run


def test_a_known_ratio_comes_out():
    found = bench.interleave({"one": work(4), "three": work(12)}, rounds=9)
    assert 2.4 < found["three"].over(found["one"]) < 3.6
    assert found["one"].clock == "cpu" and len(found["one"].samples) == 9
    # a sample lasts long enough to be read off a clock (the call that told how many to make may have been
    # several times as slow as the best), and tells the time of one call
    assert found["one"].calls * found["one"].seconds > 0.2 * bench.SAMPLE_SECONDS
    assert found["one"].seconds == min(found["one"].samples) <= found["one"].median


def test_sleeping_and_other_threads_of_torch_cost_nothing():
    import time

    found = bench.interleave({"sleep": lambda: time.sleep(0.03)}, rounds=1, sample_seconds=0.0)
    assert found["sleep"].seconds < 0.01
    seen = []
    torch.set_num_threads(2)
    try:
        bench.interleave({"threads": lambda: seen.append(torch.get_num_threads())}, rounds=1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_contenders_take_turns_in_both_orders():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    bench.interleave(runs, rounds=3, sample_seconds=0.0)
    turns = "".join(order)
    assert turns.endswith("abc" + "cba" + "abc"), turns


def test_nothing_is_collected_during_a_sample():
    seen = []
    bench.interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2, sample_seconds=0.0)
    assert not any(seen) and gc.isenabled() and gc.get_freeze_count() == 0


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        bench.interleave({}, rounds=0)
    with pytest.raises(ValueError, match="pass cpu or cuda"):
        bench.interleave({}, device="meta")
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="share a name"):
        bench.measure([Contender("a", lambda: x, [x])] * 2)
    with pytest.raises(ValueError, match="backward"):
        bench.measure([Contender("a", lambda: x, [x])], modes=("backward",))


def test_weighing_leaves_nothing_behind():
    x = torch.randn(100, requires_grad=True)
    results = []

    def forward():
        y = x.exp()  # keeps its own result
        results.append(weakref.ref(y))
        return y

    assert bench.kept_bytes(forward, [x]) == 400
    gc.collect()
    assert results[0]() is None


def test_kept_bytes():
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(100, requires_grad=True)
    assert bench.kept_bytes(lambda: x * y, [x, y]) == 0  # the inputs are there anyway
    assert bench.kept_bytes(lambda: x * y, [x]) == 400
    assert bench.kept_bytes(lambda: x.exp(), [x]) == 400  # its own result
    assert bench.kept_bytes(lambda: x.view(10, 10).t() * 2 * y.view(10, 10), [x, y]) == 400
    both = bench.kept_bytes(lambda: (x.sin() * y, x.sin() + y), [x, y])
    assert both == 400  # sin(x) once for the product; the other is not needed
    assert bench.kept_bytes(lambda: (x.exp() * y).square(), [x, y]) == 800
    assert bench.kept_bytes(lambda: x + y, [x, y]) == 0
    with torch.no_grad():
        assert bench.kept_bytes(lambda: x.exp(), [x]) == 400


def test_measure():
    x = torch.randn(64, 64, requires_grad=True)
    w = torch.randn(64, 64)
    said = []

    def broken():
        raise RuntimeError("this device is\n too old")

    results = bench.measure(
        [
            Contender("product", lambda: torch.mm(x, x), [x]),
            Contender("tuple", lambda: (torch.mm(x, x), None, [x.exp()]), [x, w.requires_grad_()]),
            Contender("broken", broken, [x]),
            Contender("no gradient", lambda: torch.mm(w, w)),
            Contender("no backward", lambda: torch.mm(w, w).detach(), [w]),
        ],
        rounds=2,
        say=said.append,
    )
    assert list(results) == ["product", "tuple", "broken", "no gradient", "no backward"]
    assert results["broken"].error == "RuntimeError: this device is too old" and not results["broken"].times
    assert set(results["product"].times) == {FORWARD, BOTH} and results["product"].kept_bytes == 0
    assert results["tuple"].kept_bytes == 4 * 64 * 64
    assert set(results["no backward"].times) == {FORWARD} and "grad" in results["no backward"].error
    assert set(results["no gradient"].times) == {FORWARD} and results["no gradient"].kept_bytes is None
    assert results["product"].times[BOTH].over(results["product"].times[FORWARD]) > 1.2
    assert any("broken" in text for text in said)
    assert x.grad is None


def test_gradients_are_taken_to_every_input_and_the_same_each_time():
    x, y = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, grad):
            seen.append((grad.clone(), ctx.needs_input_grad))
            return grad, grad

    bench.measure([Contender("watched", lambda: Watch.apply(x, y), [x, y])], rounds=2, modes=(BOTH,))
    assert len(seen) >= 4 and all(needed == (True, True) for _, needed in seen)
    assert all(torch.equal(seen[0][0], grad) for grad, _ in seen) and seen[0][0].std() > 0.1


def test_json():
    x = torch.randn(4, requires_grad=True)
    results = bench.measure([Contender("a", lambda: x.exp(), [x])], rounds=2)
    results["b"] = bench.Result("b", error="cannot")
    line = bench.json_line(
        results, commit="abc", device=bench.describe("cpu", ["numpy", "no-such-thing"]), bench="test", n=[1]
    )
    assert "\n" not in line
    read = json.loads(line)
    assert read["commit"] == "abc" and read["bench"] == "test" and read["n"] == [1]
    assert read["device"]["type"] == "cpu" and read["device"]["device"]
    assert read["device"]["versions"].keys() >= {"torch", "python", "numpy"}
    assert "no-such-thing" not in read["device"]["versions"]
    first, second = read["results"]
    assert second == {"name": "b", "error": "cannot"} and first["kept_bytes"] == 16
    for mode in (FORWARD, BOTH):
        assert first[mode]["ms"] == pytest.approx(1e3 * results["a"].times[mode].seconds, rel=1e-4)
        assert first[mode]["clock"] == "cpu" and first[mode]["rounds"] == 2


def test_the_figure_of_each_clock():
    assert Timing((3.0, 1.0, 2.0, 9.0, 8.0)).seconds == 1.0
    on_device = Timing((3.0, 1.0, 2.0, 9.0, 8.0), "device", 1, (0.1, 0.3, 0.2, 0.1, 0.1))
    assert on_device.seconds == 3.0 and on_device.record()["issue_ms"] == 100.0


@pytest.fixture
def device_log(monkeypatch):
    """A device that writes down what it is told; every event is a millisecond after the one before."""
    log, events = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append(self)
            log.append("event")

        def elapsed_time(self, other):
            return float(events.index(other) - events.index(self))

    class Cache:
        def zero_(self):
            log.append("cache")

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: Cache() if a[0] == bench._CACHE_BYTES else real(*a, **k)
    )
    return log


def test_on_a_device_one_call_stands_between_events_behind_a_full_queue(device_log):
    found = bench.interleave({"a": lambda: device_log.append("call")}, rounds=2, device="cuda:0")
    sample = ["sleep", "cache", "event", "call", "event", "wait"]
    said = [entry if isinstance(entry, str) else entry[0] for entry in device_log]
    assert said == ["call", "wait", "call", "wait"] + 2 * sample
    assert all(entry[1] > 1e5 for entry in device_log if isinstance(entry, tuple))
    timing = found["a"]
    assert timing.clock == "device" and timing.samples == (1e-3, 1e-3) and len(timing.issue) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    x = torch.randn(4096, 4096, device="cuda", requires_grad=True)

    def products(n):
        return lambda: [torch.mm(x, x) for _ in range(n)]

    results = bench.measure(
        [Contender("one", products(1), [x]), Contender("four", products(4), [x])], rounds=9
    )
    one, four = results["one"], results["four"]
    for mode in (FORWARD, BOTH):
        assert 3.5 < four.times[mode].over(one.times[mode]) < 4.5
        assert four.times[mode].clock == "device" and four.times[mode].issue
    assert (
        one.peak_bytes[FORWARD] >= 4 * 4096**2
        and four.peak_bytes[FORWARD] >= 4 * one.peak_bytes[FORWARD] - 1e7
    )
    assert bench.describe("cuda")["runtime"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_peak_memory_on_a_cpu():
    x = torch.randn(1 << 21, requires_grad=True)
    size = 4 * x.numel()
    contenders = [
        Contender("three", lambda: (x + 1) * (x + 2), [x]),
        Contender("one", lambda: x.detach().square(), []),
    ]
    results = bench.measure(contenders, rounds=1)
    assert abs(results["three"].peak_bytes[FORWARD] - 3 * size) < 0.1 * size
    assert abs(results["one"].peak_bytes[FORWARD] - size) < 0.1 * size
    # the output and both sums, then the gradient of the output and of a sum
    assert results["three"].peak_bytes[BOTH] > 3.9 * size
    assert results["three"].record()["peak_bytes"] == results["three"].peak_bytes


def test_importing_it_is_light():
    code = "import sys, vilma.bench; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

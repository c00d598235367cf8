"""Timing of several contenders in one process, what they keep in memory, and on what that was measured.

The one place of timing. It knows no models, contenders are passed in:

    results = measure([Contender("ours", lambda: f(x), [x]), Contender("theirs", lambda: g(x), [x])])
    results["ours"].times[BOTH].over(results["theirs"].times[BOTH])    # 0.5: half the time

How a call is timed:

- Contenders take turns, one sample each a round, every other round in the opposite order, so that a machine
  whose speed drifts slows all of them. A figure is worth quoting as a ratio inside one such run.
- CPU: process CPU time with one thread. Other programs then cost little, and the minimum over the rounds is
  the figure. A short call is repeated until a sample lasts `SAMPLE_SECONDS`. (Pools of threads other than
  torch's are the caller's: OMP_NUM_THREADS=1.)
- CUDA and ROCm: events around one call, with the L2 cache overwritten before it and the stream kept busy
  while the call is being issued, so that only the device's own time is counted; the median is the figure.
  What issuing it cost the CPU stands beside it (`Timing.issue`): a call is bound by the larger of the two.
- Python's garbage collector runs before each sample and not during one.

torch is imported when something is measured, not with this module.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "BOTH",
    "FORWARD",
    "Contender",
    "Result",
    "Timing",
    "describe",
    "interleave",
    "json_line",
    "kept_bytes",
    "measure",
]

FORWARD, BOTH = "forward", "forward+backward"
SAMPLE_SECONDS = 0.02
_CACHE_BYTES = 256 << 20  # several times the L2 cache of any device so far
_CLOCK_HZ = 2.0e9  # of `torch.cuda._sleep`; a slower clock only sleeps longer
_MAX_SLEEP = 0.2  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a sample each round.

    Args:
        clock: ``cpu`` (process CPU time) or ``device`` (events).
        calls: calls that each sample is the mean of.
        issue: seconds that the CPU took to issue the call, where ``clock`` is ``device``.
    """

    samples: tuple[float, ...]
    clock: str = "cpu"
    calls: int = 1
    issue: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """The figure to quote: minimum of CPU time, median of device time."""
        return min(self.samples) if self.clock == "cpu" else self.median

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def over(self, other: "Timing") -> float:
        """This time over another's."""
        return self.seconds / other.seconds

    def record(self) -> dict[str, Any]:
        """What a JSON line keeps of it, in milliseconds."""
        kept = {
            "ms": _ms(self.seconds),
            "min_ms": _ms(min(self.samples)),
            "median_ms": _ms(self.median),
            "rounds": len(self.samples),
            "calls": self.calls,
            "clock": self.clock,
        }
        return kept | ({"issue_ms": _ms(statistics.median(self.issue))} if self.issue else {})


@dataclass(frozen=True)
class Contender:
    """Something that is measured.

    Args:
        forward: returns a tensor, or a tuple or list of tensors and None.
        inputs: what the gradient is taken to (arguments, parameters); they require grad. Without any, only
            the forward pass is timed. An input that takes no part gets no gradient and is no error.
    """

    name: str
    forward: Callable[[], Any]
    inputs: "Sequence[Tensor]" = ()


@dataclass
class Result:
    """What was measured of one contender.

    Args:
        times: by mode. ``forward`` runs under no_grad; ``forward+backward`` takes the gradient of all inputs,
            for an upstream gradient that was drawn before.
        peak_bytes: by mode: most memory in use at once beyond what was there before the call. CUDA: what was
            allocated; CPU (Linux): what was resident, compiled work spaces included.
        kept_bytes: see the function of this name.
        error: why it could not run (the backward), in one line.
    """

    name: str
    times: dict[str, Timing] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    kept_bytes: int | None = None
    error: str = ""

    def record(self) -> dict[str, Any]:
        """What a JSON line keeps of it."""
        kept: dict[str, Any] = {"name": self.name} | ({"error": self.error} if self.error else {})
        kept |= {mode: timing.record() for mode, timing in self.times.items()}
        if self.kept_bytes is not None:
            kept["kept_bytes"] = self.kept_bytes
        return kept | ({"peak_bytes": self.peak_bytes} if self.peak_bytes else {})


def measure(
    contenders: Iterable[Contender],
    *,
    device: "torch.device | str | None" = None,
    rounds: int | None = None,
    modes: Sequence[str] = (FORWARD, BOTH),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Result]:
    """Time every contender against the others and weigh what it allocates.

    One that raises when it is first called is left out from there on, and its `Result` says why. With
    autocast, call it inside that context.

    Args:
        device: where the contenders run; that of the first input when None.
        rounds: samples of each; 5 on a CPU and 30 elsewhere when None.
        say: told what is being done, one line at a time.

    Returns:
        results by name, in the order given.
    """
    import torch

    contenders = list(contenders)
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders share a name: {', '.join(names)}; give each its own")
    if unknown := set(modes) - {FORWARD, BOTH}:
        raise ValueError(f"modes {sorted(unknown)}; known: {FORWARD!r}, {BOTH!r}")
    if device is None:
        device = next((x.device for c in contenders for x in c.inputs), "cpu")
    device = torch.device(device)
    rounds = rounds or (5 if device.type == "cpu" else 30)
    results = {name: Result(name) for name in names}
    runs: dict[str, dict[str, Callable[[], Any]]] = {mode: {} for mode in modes}
    for contender in contenders:
        for mode in modes:
            if mode == FORWARD or contender.inputs:
                runs[mode][contender.name] = _prepare(contender, mode)
        if contender.name in runs.get(BOTH, ()):
            say(f"weighing {contender.name}")
            try:
                results[contender.name].kept_bytes = kept_bytes(contender.forward, contender.inputs)
            except Exception as error:
                results[contender.name].error = _one_line(error)
                del runs[BOTH][contender.name]
    for mode in modes:
        say(f"timing {mode}: {rounds} rounds of {len(runs[mode])}")
        errors: dict[str, str] = {}
        for name, timing in interleave(runs[mode], rounds=rounds, device=device, errors=errors).items():
            results[name].times[mode] = timing
            peak = _peak_bytes(runs[mode][name], device)
            if peak is not None:
                results[name].peak_bytes[mode] = peak
        for name, error in errors.items():
            results[name].error = error
    return results


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    device: "torch.device | str" = "cpu",
    sample_seconds: float = SAMPLE_SECONDS,
    errors: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time callables that take nothing, in turns.

    Each is called before the first round until it is warm. Use it for what `Contender` does not describe: a
    step of an optimiser, a control step, a data loader.

    Args:
        sample_seconds: on a CPU, how long a sample lasts at least.
        errors: where given, a callable that raises when it is first called is left out, and its error noted
            here by name.
    """
    import torch

    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; pass at least 1")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device} has no clock here; pass cpu or cuda")
    clock: _CpuClock | _DeviceClock
    clock = _CpuClock(sample_seconds) if device.type == "cpu" else _DeviceClock(device)
    samples: dict[str, list[tuple[float, float]]] = {}
    with _one_thread(), _no_collection():
        for name, run in runs.items():
            try:
                clock.warm_up(name, run)
            except Exception as error:  # a peer may raise whatever it likes
                if errors is None:
                    raise
                errors[name] = _one_line(error)
            else:
                samples[name] = []
        for turn in range(rounds):
            for name in list(samples)[:: -1 if turn % 2 else 1]:
                gc.collect()
                samples[name].append(clock.sample(name, runs[name]))
    return {name: clock.timing(name, taken) for name, taken in samples.items()}


class _CpuClock:
    """Process CPU time, a mean over as many calls as a sample needs to be long enough."""

    def __init__(self, sample_seconds: float):
        self.sample_seconds = sample_seconds
        self.calls: dict[str, int] = {}

    def warm_up(self, name: str, run: Callable[[], Any]) -> None:
        begin = time.process_time()
        run()
        took = time.process_time() - begin
        if took < self.sample_seconds:  # the first call may have built something
            begin = time.process_time()
            run()
            took = time.process_time() - begin
        self.calls[name] = max(1, math.ceil(self.sample_seconds / max(took, 1e-7)))

    def sample(self, name: str, run: Callable[[], Any]) -> tuple[float, float]:
        calls = self.calls[name]
        begin = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - begin) / calls, 0.0

    def timing(self, name: str, taken: Sequence[tuple[float, float]]) -> Timing:
        return Timing(tuple(seconds for seconds, _ in taken), "cpu", self.calls[name])


class _DeviceClock:
    """Events around one call, issued while the device still sleeps, after its cache was overwritten."""

    def __init__(self, device: "torch.device"):
        import torch

        self.device = device
        self.cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
        self.sleep: dict[str, int] = {}

    def warm_up(self, name: str, run: Callable[[], Any]) -> None:
        import torch

        run()  # what is compiled or tuned on a first call is not to count as issuing
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        run()
        issue = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        self.sleep[name] = round(min(2 * issue + 1e-4, _MAX_SLEEP) * _CLOCK_HZ)

    def sample(self, name: str, run: Callable[[], Any]) -> tuple[float, float]:
        import torch

        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.sleep[name])
            self.cache.zero_()
            first.record()
            begin = time.perf_counter()
            run()
            issue = time.perf_counter() - begin
            last.record()
            torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3, issue

    def timing(self, name: str, taken: Sequence[tuple[float, float]]) -> Timing:
        seconds, issue = zip(*taken)
        return Timing(seconds, "device", 1, issue)


def kept_bytes(forward: Callable[[], Any], inputs: "Sequence[Tensor]" = ()) -> int:
    """Bytes that autograd keeps between forward and backward: every storage once, those of ``inputs`` not.

    Counted is what passes `torch.autograd.graph.saved_tensors_hooks`, outputs that are saved included;
    tensors that a function hides in attributes of its own are not seen.
    """
    import torch

    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(x: "Tensor") -> "Tensor":
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes(), storage  # holding it keeps the address its own
        return x.detach()  # a result that knows its own graph would keep both alive for ever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    total = sum(size for size, _ in kept.values())
    del output
    return total


def describe(device: "torch.device | str" = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """The device and the versions that a figure depends on.

    Args:
        packages: distributions to add, as pip writes them; those that are not installed are left out.
    """
    import torch

    device = torch.device(device)
    facts: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    else:
        facts["device"] = _processor()
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = 1
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return facts | {"versions": versions}


def json_line(results: Mapping[str, Result], *, commit: str, device: Mapping[str, Any], **facts: Any) -> str:
    """One line of JSON: facts (bench, command, shape, ...), device and versions, commit, then the results.

    Args:
        commit: of the code that was measured (`vilma.report.source_commit`).
        device: of `describe`.
    """
    line = {**facts, "commit": commit, "device": dict(device)}
    return json.dumps(line | {"results": [result.record() for result in results.values()]})


def _prepare(contender: Contender, mode: str) -> Callable[[], Any]:
    """What is timed. The upstream gradient is drawn in the first call, the same numbers for everyone."""
    import torch

    if mode == FORWARD:

        def forward() -> None:
            with torch.no_grad():
                contender.forward()

        return forward
    generator = torch.Generator().manual_seed(0)
    upstream: list[Tensor] = []

    def both() -> None:
        with torch.enable_grad():
            outputs = [x for x in _flat(contender.forward()) if x.requires_grad]
            if not outputs:
                raise ValueError("nothing that forward returns requires grad")
            if not upstream:
                upstream.extend(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
            torch.autograd.grad(outputs, list(contender.inputs), upstream, allow_unused=True)

    return both


def _flat(output: Any) -> "Iterator[Tensor]":
    if isinstance(output, (tuple, list)):
        for part in output:
            yield from _flat(part)
    elif output is not None:
        yield output


def _peak_bytes(run: Callable[[], Any], device: "torch.device") -> int | None:
    import torch

    if device.type != "cuda":
        return _peak_resident(run)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_resident(run: Callable[[], Any]) -> int | None:
    """None where the system does not tell it (it is Linux that does)."""
    process = Path("/proc/self")

    def resident(name: str) -> int:
        line = next(x for x in (process / "status").read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed is resident until it is given back
        (process / "clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS:")
    except (AttributeError, OSError, StopIteration):
        return None
    run()
    return max(0, resident("VmHWM:") - before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No automatic collection; what is alive now is set aside, which makes a collection by hand quick."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.5g}")

"""PointMapPolicy on a GPU, for `vilma bench-gpu`: latency of a whole chunk, and training at full size.

Random pictures and weights; vectors stand for the text, as the CLIP vectors of a data set are cached. A chunk
is what a robot waits for: unprojection of the depth (float32), all encoders and every denoising step (weights
in bfloat16, convolutions with channels last). Training has float32 weights under autocast to bfloat16.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vilma import config
from vilma.bench import interleave
from vilma.policies import PointMapPolicy, PointMapPolicyConfig
from vilma.testing import rms_ratio
from vilma.tools.bench_policy import observation

__all__ = ["RECIPES", "chunk_latency", "training"]

RECIPES = {
    "CALVIN cat": "configs/policies/pointmap_calvin.yaml",
    "RoboCasa xyz": "configs/policies/pointmap_robocasa.yaml",
    "real robot": "configs/policies/pointmap_real.yaml",
}
TOY = {
    "rgb_encoder": "spatial_softmax",
    "xyz_encoder": "spatial_softmax",
    "dim": 32,
    "num_blocks": 1,
    "num_heads": 2,
}


def chunk_latency(
    recipe: str, device: torch.device, *, toy: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Milliseconds of one chunk at batch 1, by wall clock with the device awaited, as a robot waits for it.

    Eager, from a CUDA graph, and where ``compiled`` also through torch.compile with and without a graph.
    ``error``: RMS ratio of the eager chunk to float32, the gripper's sign left out, and ``graph equals
    eager`` whether replays give the very same actions for another observation.
    """
    policy, values = _policy(recipe, device, toy)
    policy.eval()
    closed = set(values.gripper_index)
    smooth = [index for index in range(values.action_dim) if index not in closed]
    generator = torch.Generator(device).manual_seed(0)
    given = [
        (
            _observations(values, 1, device),
            torch.randn(1, values.text_dim, device=device, generator=generator),
            torch.randn(1, values.horizon, values.action_dim, device=device, generator=generator),
        )
        for _ in range(2)
    ]
    run = _chunk(policy, device)
    with torch.inference_mode():
        exact = policy.chunk(*given[0])[..., smooth]
        in_half_precision(policy)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in policy.parameters()),
            "error": rms_ratio(run(*given[0])[..., smooth], exact),
        }
        runs: dict[str, Callable[[], Any]] = {"eager": lambda: run(*given[0])}
        if device.type == "cuda":
            replay, same = _graphed(run, given)
            runs["CUDA graph"], figures["graph equals eager"] = replay, same
        if compiled and device.type == "cuda":
            began = time.monotonic()
            fast = torch.compile(run, dynamic=False)
            figures["compiled error"] = rms_ratio(fast(*given[0])[..., smooth], exact)
            figures["compile seconds"] = time.monotonic() - began
            runs["compiled"] = lambda: fast(*given[0])
            runs["compiled, CUDA graph"] = _graphed(fast, given)[0]
        figures |= {f"{name} ms": _wall_ms(call, device, 2 if toy else 30) for name, call in runs.items()}
        if device.type == "cuda":
            timing = interleave(runs, rounds=20, device=device)
            figures |= {f"{name} device ms": 1e3 * t.seconds for name, t in timing.items()}
    return figures


def training(recipe: str, device: torch.device, batch_size: int, *, toy: bool = False) -> dict[str, Any]:
    """A training step of bfloat16 autocast with AdamW: samples a second and peak memory."""
    policy, values = _policy(recipe, device, toy)
    policy.train()
    batch = _observations(values, batch_size, device) | {
        "action": torch.rand(batch_size, values.horizon, values.action_dim, device=device) * 2 - 1
    }
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = policy(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(1 if toy else 4):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds = 1 if toy else 20
    took = _wall_ms(step, device, rounds)
    figures = {"batch": batch_size, "step ms": took, "samples a second": 1e3 * batch_size / took}
    if device.type == "cuda":
        figures["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures


def _policy(recipe: str, device: torch.device, toy: bool) -> tuple[PointMapPolicy, PointMapPolicyConfig]:
    values = config.decode(PointMapPolicyConfig, config.read(RECIPES[recipe])["policy"])
    values = dataclasses.replace(values, text_encoder="hashed", rgb_pretrained=False, **(TOY if toy else {}))
    if toy:
        values = dataclasses.replace(values, rgb_encoder_options={}, xyz_encoder_options={})
    torch.manual_seed(0)
    policy = PointMapPolicy(values)
    numbers = dict.fromkeys(("min", "mean"), [-1.0] * values.action_dim)
    numbers |= dict.fromkeys(("max", "std"), [1.0] * values.action_dim)
    policy.set_statistics({"action": numbers})
    return policy.to(device), values


def in_half_precision(policy: PointMapPolicy) -> None:
    """Weights of encoders and denoiser in bfloat16, once instead of in every call; geometry stays float32."""
    frequencies = policy.denoiser.sigma_embed.frequencies
    for part in (policy.encoders, policy.adapters, policy.denoiser):
        part.to(torch.bfloat16, memory_format=torch.channels_last)
    policy.denoiser.sigma_embed.frequencies = frequencies


def _observations(values: PointMapPolicyConfig, batch_size: int, device: torch.device) -> dict[str, Any]:
    one = observation(values)
    return {
        key: ["lift the block"] * batch_size
        if key == "task"
        else value.expand(batch_size, *value.shape[1:]).contiguous().to(device)
        for key, value in one.items()
    }


def _chunk(policy: PointMapPolicy, device: torch.device) -> Callable[..., Tensor]:
    def run(obs: Mapping[str, Any], goal: Tensor, noise: Tensor) -> Tensor:
        # A graph must not hold on to casts that were cached before it.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return policy.chunk(obs, goal, noise)

    return run


def _graphed(run: Callable[..., Tensor], given: list[tuple[Any, Tensor, Tensor]]) -> tuple[Callable, bool]:
    """A replay of ``run`` on the first of ``given``, its inputs copied in each time; whether it is exact."""
    obs, goal, noise = given[0]
    fixed = (
        {key: x.clone() if isinstance(x, Tensor) else x for key, x in obs.items()},
        goal.clone(),
        noise.clone(),
    )

    def load(obs: Mapping[str, Any], goal: Tensor, noise: Tensor) -> None:
        for key, x in fixed[0].items():
            if isinstance(x, Tensor):
                x.copy_(obs[key])
        fixed[1].copy_(goal)
        fixed[2].copy_(noise)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*fixed)

    def replay(inputs: tuple[Any, Tensor, Tensor] = given[0]) -> Tensor:
        load(*inputs)
        graph.replay()
        return out

    same = all(torch.equal(replay(inputs), run(*inputs)) for inputs in reversed(given))
    return functools.partial(replay), same


def _wall_ms(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median milliseconds of a call by itself, the device awaited before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    took = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        call()
        wait()
        took.append(time.perf_counter() - began)
    return 1e3 * sorted(took)[len(took) // 2]

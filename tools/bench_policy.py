"""Time PointMapPolicy's inference on a CPU, beside a transformer backbone and the reference's xLSTM form.

One thread, float32, batch 1, random weights. First the networks are compared with float64 or with each other;
where one is wrong nothing is timed and the exit status is 1. Then all contenders take turns in one process
(see vilma/bench.py). Quote the ratios, not the milliseconds.
"""

import argparse
import copy
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma import config
from vilma.bench import FORWARD, Result, describe, interleave, json_line
from vilma.policies import PointMapPolicy, PointMapPolicyConfig, edm
from vilma.policies.backbones import TransformerBlock
from vilma.policies.denoiser import Denoiser
from vilma.report import source_commit
from vilma.targets import Line, show
from vilma.testing import rms_ratio
from vilma.xlstm import xLSTMLargeBlock

EPILOG = """\
cases:
  denoiser  one denoising step: [sigma, goal, 4 observations, 10 actions], width 512. The reference's form is
            plain eager torch from the equations: every projection by itself, the mLSTM's quadratic form
  prefix    all denoising steps of a chunk: the noise token first (as the paper), or last with the
            observations read once; for 4 observation tokens, and for CALVIN's 134 local ones
  real, calvin
            a whole chunk (encoders, then all denoising steps) of configs/policies/pointmap_<case>.yaml; the
            transformer has the xLSTM's depth, width and number of parameters
"""
TOLERANCE = 1e-4  # RMS ratio of outputs that should be the same; random weights amplify rounding
SPEEDUP = 1.3  # of ours over the reference's form
REFERENCE_RATIO, WITHIN = 0.91, 0.15  # what the reference's xLSTM took of an equal transformer's time
OURS, REFERENCE, TRANSFORMER = "xlstm", "xlstm, reference form", "transformer"
PLAIN_TRANSFORMER = "transformer, eager"
FIRST, LAST = "noise token first", "noise token last"
CHUNK, STEPS, ENCODERS = ", whole chunk", ", denoising", "encoders"


class WrongResult(ValueError):
    """Two networks that stand for the same function do not agree; nothing was timed."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        sizes: of the denoiser; ``num_blocks`` of the xLSTM.
        transformer: what the transformer of equal size has instead.
        observations: numbers of observation tokens.
        recipe: YAML file of a policy; None for the denoiser by itself.
        changes: of its policy's options.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    observations: tuple[int, ...] = (4,)
    recipe: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


_CALVIN = {"latent_dim": 2048, "goal_dim": 512, "action_dim": 7, "horizon": 10, "dim": 512, "num_blocks": 10}
_EQUAL = {"backbone": "transformer", "ffn_factor": 2.6667}  # a block's parameters are then the xLSTM block's
CASES = {
    "denoiser": Case(_CALVIN, {"backbone": "transformer", "num_blocks": 8}),
    "prefix": Case(_CALVIN, observations=(4, 134)),
    "real": Case(transformer=_EQUAL, recipe="configs/policies/pointmap_real.yaml"),
    "calvin": Case(transformer=_EQUAL, recipe="configs/policies/pointmap_calvin.yaml"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma bench-policy",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run; no figures to quote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    options = parser.parse_args(arguments)
    command = shlex.join(["vilma", "bench-policy", *(sys.argv[1:] if arguments is None else arguments)])
    measured = []
    for name in options.cases or CASES:
        if name not in CASES:
            raise ValueError(f"case {name!r} is not known; choose of {', '.join(CASES)}")
        print(f"# {name}", file=sys.stderr, flush=True)
        try:
            measured.append(
                bench(name, CASES[name], rounds=2 if options.quick else options.rounds, command=command)
            )
        except WrongResult as error:
            print(f"vilma bench-policy: {error}", file=sys.stderr)
            return 1
        for text in table(measured[-1]):
            print(text)
        print(json.dumps(measured[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[\n" + ",\n".join(json.dumps(line) for line in measured) + "\n]\n")
    return show(lines(measured))


def bench(name: str, case: Case, *, rounds: int = 15, command: str = "") -> dict[str, Any]:
    """Compare, then time one case; returns what its JSON line holds. Raises `WrongResult`."""
    torch.manual_seed(0)
    with torch.inference_mode():
        if case.recipe is not None:
            found = _policy(case)
        else:
            found = _prefix(case) if len(case.observations) > 1 else _step(case)
        runs, errors, facts = found
        wrong = [f"{what} {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE]
        if wrong:
            raise WrongResult(
                f"{name}: wrong by more than {TOLERANCE:.0e}, so nothing is timed: {', '.join(wrong)}"
            )
        timings = interleave(runs, rounds=rounds)
    results = {run: Result(run, {FORWARD: timing}) for run, timing in timings.items()}
    line = json_line(
        results,
        commit=source_commit(),
        device=describe("cpu", ("timm",)),
        bench="policy",
        command=command,
        case=name,
        dtype="float32",
        errors={what: float(f"{error:.1e}") for what, error in errors.items()},
        **facts,
    )
    return json.loads(line)


Found = tuple[dict[str, Callable[[], Tensor]], dict[str, float], dict[str, Any]]


def _step(case: Case) -> Found:
    """One step from observations to F, all embeddings included, as the reference runs it."""
    (count,) = case.observations
    ours = _denoiser(case.sizes, count)
    transformer = _denoiser({**case.sizes, **case.transformer}, count)
    nets = {
        OURS: ours,
        REFERENCE: in_plain_form(ours),
        TRANSFORMER: transformer,
        PLAIN_TRANSFORMER: in_plain_form(transformer),
    }
    obs, goal, x = _inputs(case.sizes, count)
    sigma = torch.tensor([0.5])
    runs = {name: lambda d=d: d(x, sigma, d.context(obs, goal)) for name, d in nets.items()}
    errors = {}
    for fast, plain in ((OURS, REFERENCE), (TRANSFORMER, PLAIN_TRANSFORMER)):
        net = in_plain_form(copy.deepcopy(nets[fast]).double())
        exact = net(x.double(), sigma.double(), net.context(obs.double(), goal.double()))
        errors |= {name: rms_ratio(runs[name](), exact) for name in (fast, plain)}
    return runs, errors, {"parameters": {name: _count(d) for name, d in nets.items()}}


def _prefix(case: Case) -> Found:
    """All steps of a chunk, given the observations' encodings."""
    runs, errors = {}, {}
    for count in case.observations:
        nets = {FIRST: _denoiser(case.sizes, count), LAST: _denoiser(case.sizes, count, noise_token="last")}
        obs, goal, x = _inputs(case.sizes, count)
        for name, net in nets.items():
            runs[f"{name}, {count} observations"] = lambda net=net, given=(obs, goal, x): _sample(net, *given)
        context, sigma = nets[LAST].context(obs, goal), torch.tensor([0.5])
        plain = nets[LAST](x, sigma, context)
        cached = nets[LAST](x, sigma, context, nets[LAST].remember(context))
        errors[f"{LAST}, {count} observations"] = rms_ratio(cached, plain)
    return runs, errors, {}


def _sample(net: Denoiser, obs: Tensor, goal: Tensor, noise: Tensor) -> Tensor:
    context = net.context(obs, goal)
    memory = net.remember(context)
    sigmas = edm.sigmas_exponential(4)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return edm.denoise(lambda x, s: net(x, s, context, memory), x, sigma)

    return edm.sample_ddim(denoise, noise * sigmas[0], sigmas)


def _policy(case: Case) -> Found:
    """Whole chunks from pictures; the encoders are the same ones for all backbones."""
    values = config.decode(PointMapPolicyConfig, config.read(case.recipe)["policy"])
    # vectors stand for the text, and random weights for the pretrained ones
    values = dataclasses.replace(values, text_encoder="hashed", rgb_pretrained=False, **case.changes)
    ours = PointMapPolicy(values)
    if values.action_normalization != "none":
        ours.set_statistics(
            {
                "action": dict.fromkeys(("min", "mean"), [-1.0] * values.action_dim)
                | dict.fromkeys(("max", "std"), [1.0] * values.action_dim)
            }
        )
    ours.eval()
    sizes = {
        "latent_dim": ours.fusion.width,
        "goal_dim": values.text_dim,
        "action_dim": values.action_dim,
        "horizon": values.horizon,
        "dim": values.dim,
        "num_blocks": values.num_blocks,
        "num_heads": values.num_heads,
    }
    count = ours.denoiser.num_obs_tokens
    policies = {
        OURS: ours,
        f"{OURS}, {LAST}": with_denoiser(ours, _denoiser(sizes, count, noise_token="last")),
        REFERENCE: with_denoiser(ours, in_plain_form(ours.denoiser)),
        TRANSFORMER: with_denoiser(ours, _denoiser({**sizes, **case.transformer}, count)),
    }
    obs = observation(values)
    goal, noise = torch.randn(1, values.text_dim), torch.randn(1, values.horizon, values.action_dim)
    runs = {name + CHUNK: lambda p=p: p.chunk(obs, goal, noise) for name, p in policies.items()}
    runs[ENCODERS] = lambda: ours.context(obs, goal)
    contexts = {name: p.context(obs, goal) for name, p in policies.items()}
    runs |= {
        name + STEPS: lambda p=p, c=contexts[name]: _denoised(p, c, noise) for name, p in policies.items()
    }
    given = noise, torch.tensor([0.5]), contexts[OURS]
    errors = {REFERENCE: rms_ratio(ours.denoiser(*given), policies[REFERENCE].denoiser(*given))}
    parameters = {name: _count(p.denoiser) for name, p in policies.items()} | {
        ENCODERS: _count(ours.encoders)
    }
    return runs, errors, {"recipe": case.recipe, "parameters": parameters}


def _denoised(policy: PointMapPolicy, context: Tensor, noise: Tensor) -> Tensor:
    """The part of a chunk that follows the encoders."""
    memory = policy.denoiser.remember(context)
    return policy.head.sample(lambda x, sigma: policy.denoiser(x, sigma, context, memory), noise)


def with_denoiser(policy: PointMapPolicy, denoiser: Denoiser) -> PointMapPolicy:
    """The same policy, its other parts shared, with another denoiser."""
    other = copy.copy(policy)
    other._modules = {**policy._modules, "denoiser": denoiser}
    return other


def observation(values: PointMapPolicyConfig) -> dict[str, Any]:
    """Random pictures and depth of one robot at one time, as ``values`` wants them."""
    obs: dict[str, Any] = {"task": ["-"]}
    for camera in values.cameras:
        height, width = values.image_size[camera]
        intrinsics = torch.tensor([[height, 0, width / 2], [0, height, height / 2], [0, 0, 1]])
        obs |= {
            f"observation.images.{camera}": torch.randint(
                0, 256, (1, 1, 3, height, width), dtype=torch.uint8
            ),
            f"observation.depth.{camera}": 0.5 + torch.rand(1, 1, height, width),
            f"observation.intrinsics.{camera}": intrinsics.expand(1, 1, 3, 3),
            f"observation.pose.{camera}": torch.eye(4).expand(1, 1, 4, 4),
        }
    return obs


def _denoiser(sizes: Mapping[str, Any], num_obs_tokens: int, **changes: Any) -> Denoiser:
    return Denoiser(num_obs_tokens=num_obs_tokens, **sizes, **changes).eval()


def _inputs(sizes: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor, Tensor]:
    obs, goal = torch.randn(1, count, sizes["latent_dim"]), torch.randn(1, 1, sizes["goal_dim"])
    return obs, goal, torch.randn(1, sizes["horizon"], sizes["action_dim"])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def in_plain_form(denoiser: Denoiser) -> Denoiser:
    """The same network and weights, its blocks run as `PlainStack`."""
    other = copy.copy(denoiser)
    other._modules = {**denoiser._modules, "stack": PlainStack(denoiser.stack)}
    return other


class PlainStack(nn.Module):
    """A stack as the reference runs it: plain eager torch from the equations, all tokens through all blocks.

    The T x T form of mixing (arXiv 2503.13427, section 2; arXiv 2405.04517, appendix), norms by hand, every
    projection by itself; the two halves of the transformer's SwiGLU are one matrix there, and here.
    """

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.blocks, self.out_norm = stack.blocks, stack.out_norm
        self.swiglu = {
            block: torch.cat([block.proj_up_gate.weight, block.proj_up.weight])
            for block in self.blocks
            if isinstance(block, TransformerBlock)
        }

    def forward(self, x: Tensor, memory: None = None, last: int | None = None) -> Tensor:
        for block in self.blocks:
            if isinstance(block, xLSTMLargeBlock):
                x = x + _plain_mlstm(block.mlstm_layer, _plain_rms_norm(block.norm_mlstm, x))
                y, ffn = _plain_rms_norm(block.norm_ffn, x), block.ffn
                gate, up = F.linear(y, ffn.proj_up_gate.weight), F.linear(y, ffn.proj_up.weight)
            else:
                x = x + _plain_attention(block, _plain_rms_norm(block.norm_attention, x))
                y, ffn = _plain_rms_norm(block.norm_ffn, x), block
                gate, up = F.linear(y, self.swiglu[block]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, ffn.proj_down.weight)
        x = _plain_rms_norm(self.out_norm, x)
        return x if last is None else x[:, -last:]


def _plain_rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _plain_mlstm(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (_split(F.linear(x, p.weight), layer.num_heads) for p in (layer.q, layer.k, layer.v))
    i, f = (F.linear(x, p.weight, p.bias).mT for p in (layer.igate_preact, layer.fgate_preact))
    i, f = (layer.gate_soft_cap * torch.tanh(gate / layer.gate_soft_cap) for gate in (i, f))
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    b = F.logsigmoid(f).cumsum(-1)
    log_d = b[..., :, None] - b[..., None, :] + i[..., None, :]
    log_d = log_d.masked_fill(~visible, float("-inf"))
    m = log_d.amax(-1, keepdim=True)
    p = q @ k.mT * q.shape[-1] ** -0.5 * torch.exp(log_d - m)
    h = p / (torch.maximum(p.sum(-1, keepdim=True).abs(), torch.exp(-m)) + layer.eps) @ v
    h = h.transpose(1, 2)
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + layer.multihead_norm.eps)
    h = h.flatten(2) * layer.multihead_norm.weight
    return F.linear(torch.sigmoid(F.linear(x, layer.ogate_preact.weight)) * h, layer.out_proj.weight)


def _plain_attention(block: TransformerBlock, x: Tensor) -> Tensor:
    q, k, v = (_split(F.linear(x, w), block.num_heads) for w in block.qkv.weight.chunk(3))
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), block.out_proj.weight)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(1, T, H D) -> (1, H, T, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def times(line: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds (the minimum over the rounds) of each contender."""
    return {result["name"]: result[FORWARD]["ms"] for result in line["results"]}


def table(line: Mapping[str, Any]) -> Iterator[str]:
    """Rows for people: every contender, its median, and its time over the first one's."""
    first = line["results"][0][FORWARD]["ms"]
    yield f"{line['case']}: {line['dtype']}, batch 1, one thread, {line['device']['device']}"
    yield f"  {'':<36}{'min':>10}{'median':>13}{'over the first':>17}{'parameters':>13}"
    for result in line["results"]:
        timing, name = result[FORWARD], result["name"]
        count = line.get("parameters", {}).get(name.removesuffix(CHUNK).removesuffix(STEPS))
        shown = f"{count / 1e6:.1f} M" if count else ""
        yield (
            f"  {name:<36}{timing['ms']:>7.2f} ms{timing['median_ms']:>10.2f} ms"
            f"{timing['ms'] / first:>17.2f}{shown:>13}"
        )


def lines(measured: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """What the results say of the targets; also for those that `bench` wrote to a file."""
    for line in measured:
        found, case = times(line), line["case"]
        if case == "denoiser":
            yield _at_least(f"speed of a denoising step over the {REFERENCE}", found[REFERENCE] / found[OURS])
            ratio = found[REFERENCE] / found[PLAIN_TRANSFORMER]
            near = abs(ratio / REFERENCE_RATIO - 1) <= WITHIN
            target = f"{REFERENCE_RATIO} within {WITHIN:.0%}"
            yield Line(f"time of the {REFERENCE} over {PLAIN_TRANSFORMER}'s", f"{ratio:.2f}", target, near)
        elif case == "prefix":
            cached = {name.split(", ")[1]: ms for name, ms in found.items() if name.startswith(LAST)}
            over = {count: ms / found[f"{FIRST}, {count}"] for count, ms in cached.items()}
            figure = ", ".join(f"{ratio:.2f} with {count}" for count, ratio in over.items())
            met = min(over.values()) < 1
            yield Line(f"time of a chunk's denoising, {LAST} over first", figure, "< 1 for many", met)
        else:
            ours, transformer = (found[name + CHUNK] for name in (OURS, TRANSFORMER))
            steps = [found[name + STEPS] for name in (OURS, TRANSFORMER, REFERENCE)]
            figure = (
                f"{ours:.0f} ms, with a transformer {transformer:.0f}; of it {steps[0]:.1f} ms denoising, "
                f"transformer {steps[1]:.1f}, {REFERENCE} {steps[2]:.1f}"
            )
            target = "denoising faster than the reference's form"
            yield Line(f"whole chunk of {line['recipe']}", figure, target, steps[0] < steps[2])


def _at_least(name: str, ratio: float) -> Line:
    return Line(name, f"{ratio:.2f}x", f">= {SPEEDUP}x", ratio >= SPEEDUP)


if __name__ == "__main__":
    raise SystemExit(main())

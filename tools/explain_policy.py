"""Write a picture of where a policy looks: Grad-CAM of its loss for each camera and modality.

One row a frame. Over every picture the share of the attribution that falls on it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilma import config
from vilma.extras import require
from vilma.policies import find_checkpoint, load_policy
from vilma.policies.explain import Attribution, grad_cam
from vilma.policies.views import RGB_NORMALIZATION


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    policy = load_policy(options.policy)
    if options.episodes is None:
        observations, actions = play(policy, options.env, options.seed)
        batch, frames = episode_batch(policy, observations, actions, options.frames)
        source = f"{options.env}, seed {options.seed}, played by the policy"
    else:
        data = _data_section(options.policy)
        batch, frames = recorded_batch(policy, options.episodes, options.episode, options.frames, data)
        source = f"{Path(options.episodes).name}, episode {options.episode}"
    found = grad_cam(policy, batch, options.draws, options.seed)
    out = panel(found, frames, policy.config.rgb_normalization, options.out, f"{options.policy}: {source}")
    for seen in found:
        print(f"{seen.camera} {seen.stream}: {100 * seen.share.mean():.0f} % of the attribution")
    print(out)
    return 0


def recorded_batch(
    policy: Any, path: str, episode: int, frames: Sequence[int] | int, data: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Chosen frames of one recorded episode as a batch, and their numbers."""
    from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset

    c = policy.config
    keys = {key: tuple(data[key]) for key in ("state_keys",) if key in data}
    dataset = RobomimicDataset(
        RobomimicConfig(
            path, c.cameras, obs_horizon=c.obs_horizon, action_horizon=c.horizon, cache="none", **keys
        )
    )
    if not 0 <= episode < len(dataset.episodes):
        raise ValueError(f"{path} has the episodes 0 to {len(dataset.episodes) - 1}, not {episode}")
    chosen = dataset.episodes[episode]
    numbers = _numbers(frames, chosen.length)
    policy.check_compatible(dataset.metadata, name=path)
    return dataset.__getitems__([chosen.start + number for number in numbers]), numbers


def play(policy: Any, name: str, seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """One episode of the policy itself: its observations, and its actions (T, A)."""
    import vilma.envs

    sizes = {size for pair in policy.config.image_size.values() for size in pair}
    options = {"size": sizes.pop()} if len(sizes) == 1 else {}
    env = vilma.envs.make(name, cameras=list(policy.config.cameras), seed=seed, **options)
    observations, actions = [], []
    try:
        observation, _ = env.reset(seed=seed)
        policy.reset()
        policy.seed_rows([0], [seed])
        done = False
        while not done:
            observations.append({k: v if isinstance(v, str) else v.copy() for k, v in observation.items()})
            actions.append(policy.select_action(observation).numpy())
            observation, _, terminated, truncated, _ = env.step(actions[-1])
            done = terminated or truncated
    finally:
        env.close()
    return observations, np.stack(actions)


def episode_batch(
    policy: Any, observations: list[dict[str, Any]], actions: np.ndarray, frames: Sequence[int] | int
) -> tuple[dict[str, Any], list[int]]:
    """Chosen frames of an episode as a batch with observations (B, To, ...) and actions (B, H, A)."""
    c = policy.config
    numbers = _numbers(frames, len(actions))
    batch: dict[str, Any] = {"task": [observations[n]["task"] for n in numbers]}
    for key in policy.observation_keys:
        windows = [
            [observations[max(n - back, 0)][key] for back in reversed(range(c.obs_horizon))] for n in numbers
        ]
        batch[key] = torch.from_numpy(np.asarray(windows))
    ahead = np.array(numbers)[:, None] + np.arange(c.horizon)
    batch["action"] = torch.from_numpy(actions[ahead.clip(max=len(actions) - 1)])
    batch["action_is_pad"] = torch.from_numpy(ahead >= len(actions))
    return batch, numbers


def panel(
    found: list[Attribution], frames: Sequence[int], normalization: str, out: str | Path, title: str
) -> Path:
    """PNG: a row a frame; for each picture what the encoder sees and the heat over it."""
    require("matplotlib", "robot")
    from matplotlib.figure import Figure

    rows, columns = len(frames), 2 * len(found)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, seen in enumerate(found):
        for row, frame in enumerate(frames):
            picture = _shown(seen.picture[row], seen.stream, normalization)
            heat = seen.heat[row] / seen.heat[row].max().clamp_min(1e-12)
            left, right = axes[row, 2 * column], axes[row, 2 * column + 1]
            left.imshow(picture, interpolation="nearest")
            right.imshow(picture, interpolation="nearest", alpha=0.45)
            right.imshow(heat.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            left.set_title(f"{seen.camera} {seen.stream}" if row == 0 else f"frame {frame}", fontsize=7)
            right.set_title(f"frame {frame}: {100 * seen.share[row]:.0f} %", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    return out


def _shown(picture: torch.Tensor, stream: str, normalization: str) -> np.ndarray:
    """(H, W, 3) in [0, 1]: colours as they were, points and depth stretched over their range in the frame;
    holes, which hold 0, in grey."""
    if stream in ("rgb", "xyzrgb"):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in RGB_NORMALIZATION[normalization])
        image = picture[-3:] * std + mean
    else:
        image = picture[:3] if stream == "xyz" else picture[:1].expand(3, -1, -1)
        hole = (image == 0).all(0)
        if not hole.all():
            seen = image[:, ~hole]
            low, high = (torch.quantile(seen, q, dim=1)[:, None, None] for q in (0.02, 0.98))
            image = (image - low) / (high - low).clamp_min(1e-6)
        image = image.masked_fill(hole, 0.75)
    return image.clamp(0, 1).movedim(0, -1).numpy()


def _numbers(frames: Sequence[int] | int, length: int) -> list[int]:
    if isinstance(frames, int):
        return sorted({round(i * (length - 1) / max(frames - 1, 1)) for i in range(frames)})
    outside = [frame for frame in frames if not 0 <= frame < length]
    if outside:
        raise ValueError(f"the episode has the frames 0 to {length - 1}, not {outside}")
    return list(frames)


def _data_section(policy: str) -> dict[str, Any]:
    """How the run read its data, where its config tells."""
    for folder in (Path(policy), *find_checkpoint(policy).parents[:2]):
        file = folder / "config.yaml"
        if file.is_file() and isinstance(config.read(file).get("data"), dict):
            return config.read(file)["data"]
    return {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma explain-policy", description=__doc__)
    parser.add_argument("policy", help="a run directory, a checkpoint or a saved policy")
    parser.add_argument(
        "episodes", nargs="?", help="robomimic-layout HDF5; without it the policy plays one itself"
    )
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which one of the file (0)")
    parser.add_argument("--env", default="robosuite/Lift", help="suite/task for playing (robosuite/Lift)")
    parser.add_argument("--seed", type=int, default=0, help="of the played episode and of the noise (0)")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=5, metavar="N", help="frame numbers (default: 5, spread)"
    )
    parser.add_argument("--draws", type=int, default=16, help="noise levels to average over (16)")
    parser.add_argument("--out", type=Path, default=Path("explain.png"), help="PNG to write (explain.png)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

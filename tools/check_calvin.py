"""Check CALVIN end to end on the real simulator: cameras, oracle, data, packing, training, ten chains.

Needs calvin_env (`vilma doctor calvin`). Every step is kept in the output folder; run it again to go on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vilma import config, envs
from vilma.datasets.calvin_tree import CalvinTree, gripper_pose
from vilma.datasets.calvin_writer import CalvinWriter
from vilma.envs import calvin_protocol as protocol
from vilma.envs.calvin_install import find_source
from vilma.envs.calvin_skills import SKILLS, actions, plan, record
from vilma.targets import Line, show
from vilma.tools._calvin_public import compare

RECIPE = "configs/smoke/calvin_mini.yaml"
# What the small policy learns: nothing that depends on where the blocks are.
LEARNED = tuple(task for task in SKILLS if task.split("_")[0] in ("move", "open", "close", "turn"))
SCENE = "calvin/D"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    source = find_source(options.source)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": f"vilma check-calvin --recordings {options.recordings} --chains {options.chains}"
        + (f" --challenge CLONE --draw {options.draw}" if options.challenge is not None else ""),
        "commit": _commit(),
        "versions": {name: _version(name) for name in ("vilma", "pybullet", "gym", "numpy", "torch")},
    }
    status = show(_lines(source, options, results))
    path = options.json or options.out / "check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    return status


def _lines(source: Path, options: argparse.Namespace, results: dict[str, Any]) -> Iterator[Line]:
    if options.challenge is not None:
        line = compare(options.challenge, options.draw)
        results["public_code"] = line.figure
        yield line
    env = envs.make(SCENE, source=source, renderer=options.renderer)
    try:
        observation, _ = env.reset(seed=0)
        observation, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        shapes = [observation[f"observation.images.{camera}"].shape for camera in env.cameras]
        results["renderer"] = env.renderer
        yield Line(
            "built, stepped, rendered", f"{env.renderer}, pictures {shapes}", "a picture a camera", True
        )
        results["table_height_m"] = heights = table_heights(env)
        gap = 1000 * max(abs(a - b) for a, b in heights)
        shown = ", ".join(f"{a:.4f} / {b:.4f}" for a, b in heights[:3])
        yield Line(
            f"table height, static / gripper camera, {len(heights)} poses",
            f"{shown} m, ...; at most {gap:.2f} mm apart",
            "within 5 mm",
            gap < 5,
        )
        results["gripper_pose_mm"] = off = pose_error(env)
        yield Line(
            "gripper camera recomputed from the robot state, against the simulator",
            f"at most {off:.3f} mm off",
            "below 0.1 mm",
            off < 0.1,
        )
        results["oracle"] = fired = oracle(env)
        names = ", ".join(f"{task} {count}/{tries}" for task, (count, tries) in fired.items())
        yield Line(
            "the oracle fires for scripted skills",
            f"{sum(count > 0 for count, _ in fired.values())} of {len(fired)} skills: {names}",
            "for one",
            any(count for count, _ in fired.values()),
        )
        mini = options.out / "mini"
        if not (mini / "training" / "ep_start_end_ids.npy").is_file():
            make_mini(env, mini / "training", options.recordings)
    finally:
        env.close()
    results["renderers"] = gap = renderers(source)
    shown = "EGL cannot draw here"
    if gap is not None:
        shown = (
            f"pictures of the static camera {gap['static']['grey_levels']:.0f} grey levels apart (median); "
            f"its depth comes in steps of {gap['static']['depth_step_mm']:.1f} mm with EGL, of "
            f"{gap['static']['depth_step_tiny_mm']:.2f} mm with TinyRenderer"
        )
    yield Line("TinyRenderer beside EGL", shown, "shown", True)
    yield from _policy_lines(source, mini, options, results)


def _policy_lines(
    source: Path, mini: Path, options: argparse.Namespace, results: dict[str, Any]
) -> Iterator[Line]:
    tree = CalvinTree(mini)
    segments = tree.segments()
    frames = sum(len(segment) for segment in segments)
    results["mini"] = {"segments": len(segments), "frames": frames}
    packed = options.out / "packed"
    _vilma("pack-calvin", mini, "--out", packed, "--workers", 1)
    manifest = json.loads((packed / "packed.json").read_text())
    yield Line(
        "a mini data set in CALVIN's format, packed",
        f"{manifest['segments']} segments, {manifest['frames']} frames, every array compared with its source",
        "all of them",
        manifest["segments"] == len(segments) and manifest["frames"] == frames,
    )
    run = options.out / "run"
    steps = () if options.steps is None else ("--train.steps", options.steps)
    _vilma("train-policy", config.find(RECIPE), "--run", run, "--data.path", packed, *steps)
    yield Line("a small policy trained on it", str(run), "a checkpoint", (run / "checkpoints/last").is_dir())
    for name, chains in (("", None), ("learned", learned_chains(options.out, options.chains))):
        extra = () if chains is None else ("--env.chains", chains)
        result = options.out / "eval" / f"{name or 'protocol'}.json"
        _vilma(
            *("eval", SCENE, run, "--sequences", options.chains, "--checkpoint", "last", "--out", result),
            *("--env.source", source, "--env.renderer", options.renderer, "--workers", options.workers),
            *("--films", "0", *extra),
        )
        found = json.loads(result.read_text())
        summary = found["summary"]
        results[name or "protocol"] = {
            key: summary[key] for key in ("chains", "success", "mean_length", "tasks", "lost")
        }
        rates = " ".join(f"{entry['rate']:.0%}" for entry in summary["success"])
        which = "of the protocol" if chains is None else "made of the learned tasks"
        yield Line(
            f"{summary['chains']} real chains {which}",
            f"1 to 5 in a row {rates}, mean length {summary['mean_length']['value']:.2f}",
            "every chain finished, the figure as it is",
            summary["chains"] == options.chains and not summary["lost"],
        )


def table_heights(env: Any, poses: int = 6) -> list[tuple[float, float]]:
    """The height of the table (metres) that each camera's points show, with the arm in several places."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(poses):
        env.reset(seed=number)
        for _ in range(10 * number):
            env.advance(np.append(generator.uniform(-0.5, 0.5, 3), [0, 0, 0, 1.0]))
        observation = env.observe()
        found.append(tuple(_table_height(observation, camera) for camera in ("static", "gripper")))
    return found


def _table_height(observation: dict[str, Any], camera: str) -> float:
    """The median height around the commonest one between 0.4 and 0.5 m."""
    depth = observation[f"observation.depth.{camera}"]
    matrix, pose = (observation[f"observation.{kind}.{camera}"] for kind in ("intrinsics", "pose"))
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    rays = np.stack([(u - matrix[0, 2]) / matrix[0, 0], (v - matrix[1, 2]) / matrix[1, 1], np.ones_like(u)])
    heights = (pose[2, :3] @ (rays * depth).reshape(3, -1) + pose[2, 3])[depth.ravel() > 0]
    counts, edges = np.histogram(heights, np.arange(0.4, 0.5, 0.002))
    common = edges[counts.argmax()] + 0.001
    return float(np.median(heights[np.abs(heights - common) < 0.005]))


def pose_error(env: Any, moments: int = 20) -> float:
    """How far (mm) the recomputed gripper camera is from the one that the simulator draws with.

    The state is put back first, as for released pictures, which were drawn from recorded states.
    """
    generator, worst = np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for _ in range(moments):
        for _ in range(3):
            env.advance(np.append(generator.uniform(-1, 1, 6), 1.0))
        robot, scene = env.state()
        kept = env.simulator.robot.target_pos.copy(), env.simulator.robot.target_orn.copy()
        env.place(robot, scene)
        env.draw("gripper")
        ours = gripper_pose(robot[None, 7:14])[0]
        worst = max(worst, 1000 * float(np.abs(ours[:3, 3] - env.pose("gripper")[:3, 3]).max()))
        env.simulator.robot.target_pos, env.simulator.robot.target_orn = kept
    return worst


DRAW = """
import sys, numpy as np, vilma.envs
env = vilma.envs.make("calvin/D", source=sys.argv[1], renderer=sys.argv[2])
seen, _ = env.reset(seed=0)
np.savez(sys.argv[3], **{key: value for key, value in seen.items() if key != "task"})
"""


def renderers(source: Path) -> dict[str, dict[str, float]] | None:
    """How pictures of one scene differ between PyBullet's renderers; None where EGL cannot draw.

    The step is the median distance between the values that neighbouring depths take.
    """
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        for renderer in ("tiny", "egl"):
            path = Path(folder) / f"{renderer}.npz"
            run = subprocess.run([sys.executable, "-c", DRAW, source, renderer, path], capture_output=True)
            if run.returncode:
                return None
            with np.load(path) as file:
                seen[renderer] = dict(file)
    found = {}
    for camera in ("static", "gripper"):
        images = [seen[r][f"observation.images.{camera}"].astype(int) for r in seen]
        depths = {r: np.unique(seen[r][f"observation.depth.{camera}"]) for r in seen}
        steps = {r: 1000 * float(np.median(np.diff(values[values > 0]))) for r, values in depths.items()}
        found[camera] = {
            "grey_levels": float(np.median(np.abs(images[0] - images[1]))),
            "depth_step_mm": steps["egl"],
            "depth_step_tiny_mm": steps["tiny"],
        }
    return found


def oracle(env: Any, tries: int = 2) -> dict[str, tuple[int, int]]:
    """For every scripted skill how often CALVIN's oracle says that it did its task, and the tries."""
    fired = {}
    for task in SKILLS:
        scenes = [scene for scene in protocol.conditions() if protocol.is_valid(scene, (task,))]
        count = 0
        for scene in scenes[:: max(1, len(scenes) // tries)][:tries]:
            env.place(*protocol.initial_state(scene))
            start = env.simulator.get_info()
            moves = actions(env, plan(task, env.state()[1]))
            count += any(env.is_solved(task, start, env.advance(action)) for action in moves)
        fired[task] = (count, tries)
    return fired


def make_mini(env: Any, folder: Path, recordings: int, length: int = 4) -> None:
    """Recordings of ``length`` learned tasks in a row, each from a scene of the protocol."""
    writer = CalvinWriter(folder)
    generator = np.random.default_rng(0)
    scenes = protocol.conditions()
    for number in range(recordings):
        while True:
            scene = scenes[generator.integers(len(scenes))]
            tasks = [LEARNED[i] for i in generator.permutation(len(LEARNED))[:length]]
            if protocol.is_possible(scene, tasks):
                break
        env.place(*protocol.initial_state(scene))
        recording = record(env, tasks, generator)
        first = writer.write_episode(recording.frames)
        for start, end, task in recording.solved:
            writer.annotate(first + start, first + end, protocol.INSTRUCTIONS[task], task)
        print(f"recording {number + 1} of {recordings}: {len(recording.frames)} frames", flush=True)
    writer.close()


def learned_chains(folder: Path, count: int) -> Path:
    """A file of chains made of the learned tasks alone, of which ``count`` are played.

    It holds a hundred or more, so that playing more of them later is the same evaluation.
    """
    generator, scenes = np.random.default_rng(1), protocol.conditions()
    drawn: list[protocol.Chain] = []
    while len(drawn) < max(count, 100):
        scene = scenes[generator.integers(len(scenes))]
        tasks = tuple(LEARNED[i] for i in generator.permutation(len(LEARNED))[: protocol.CHAIN_LENGTH])
        if protocol.is_possible(scene, tasks):
            drawn.append(protocol.Chain(scene, tasks))
    path = folder / "learned_chains.json"
    path.write_text(protocol.dump_chains(drawn))
    return path


def _vilma(*arguments: Any) -> None:
    """A vilma command in a process of its own; its output goes on."""
    words = [str(word) for word in arguments]
    print("+ vilma " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "vilma.cli", *words], check=True)


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma check-calvin", description=__doc__)
    parser.add_argument("--source", type=Path, metavar="DIR", help="the clone of calvin_env")
    parser.add_argument(
        "--challenge", type=Path, metavar="DIR", help="a clone of mees/calvin: draw its chains too, compare"
    )
    parser.add_argument("--draw", type=int, default=24, metavar="N", help="how many; 1000 is the protocol")
    parser.add_argument("--out", type=Path, default=Path("runs/calvin-check"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures (default: OUT/check.json)")
    parser.add_argument("--renderer", choices=("auto", "egl", "tiny"), default="auto")
    parser.add_argument("--recordings", type=int, default=14, help="of four tasks each")
    parser.add_argument("--chains", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=2, help="simulators")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

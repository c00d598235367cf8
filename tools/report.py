"""Write a run's report: one self-contained HTML page with success rates, curves, pictures and films."""

import argparse
import contextlib
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import vilma
from vilma import config
from vilma.report import source_commit, write_report

PACKAGES = ("torch", "timm", "numpy", "gymnasium", "robosuite", "mujoco", "h5py")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--headline", metavar="NAME", help="the evaluation at the top (RUN/eval/NAME.json)")
    options = parser.parse_args(arguments)
    values = _config(options.run)
    if "model" in values and "policy" not in values:
        from vilma.tools._image_report import write_image_report

        print(write_image_report(options.run))
        return 0
    with contextlib.suppress(OSError):
        draw_point_map(options.run, values)
    facts = [*_data_facts(values), ("Commit", source_commit()), ("Versions", _versions())]
    print(write_report(options.run, facts, options.headline))
    return 0


def draw_point_map(run_dir: Path, values: Mapping[str, Any]) -> None:
    """``pictures/point_map.png`` from the run's data, cut as its policy cuts it.

    Left alone when it is newer than the data and the config, or when the data are not there.
    """
    picture = run_dir / "pictures" / "point_map.png"
    path, policy = _data_path(values), values.get("policy") or {}
    if path is None or not run_dir.is_dir() or policy.get("modality") == "rgb":
        return
    sources = (path, run_dir / "config.yaml")
    newest = max(source.stat().st_mtime_ns for source in sources if source.exists())
    if picture.exists() and picture.stat().st_mtime_ns >= newest:
        return
    picture.unlink(missing_ok=True)  # it would show something else
    from vilma.pointmap import Camera, PointMap
    from vilma.pointmap.view import figure
    from vilma.tools.view_pointmap import read_frame

    maps, images, depths = {}, {}, {}
    try:
        # A little into the episode the gripper stands over the object, in view of both cameras.
        frame = read_frame(str(path), "demo_0", 12, policy.get("cameras"))
        for name, (image, depth, intrinsic, extrinsic) in frame.items():
            frame_name = policy.get("reference_frame") or "world"
            pose = np.eye(4, dtype=np.float32) if frame_name == "camera" else extrinsic
            camera = Camera(intrinsic, pose, depth.shape)
            if name in (policy.get("crops") or {}):
                top, left, height, width = policy["crops"][name]
                camera = camera.crop(top, left, height, width)
                image, depth = (a[top : top + height, left : left + width] for a in (image, depth))
            points = PointMap.from_depth(depth, camera, policy.get("depth_range"), frame=frame_name)
            maps[name] = points.crop(policy["workspace"]) if policy.get("workspace") else points
            images[name], depths[name] = image, depth
        figure(images, depths, maps, picture, "RGB, depth and the point map that the policy sees")
    except (ValueError, ImportError) as error:
        print(f"vilma report: no picture of a point map: {error}", file=sys.stderr)


def _config(run_dir: Path) -> dict[str, Any]:
    try:
        return config.read(run_dir / "config.yaml")
    except ValueError:
        return {}


def _data_path(values: Mapping[str, Any]) -> Path | None:
    path = (values.get("data") or {}).get("path")
    path = path[0] if isinstance(path, list) and path else path
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None


def _data_facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    path = _data_path(values)
    if path is None:
        return [("Data set", "not there")]
    text = f"{path.name}, {path.stat().st_size / 1e6:.1f} MB"
    facts: dict[str, Any] = {}
    with contextlib.suppress(ImportError, OSError):
        from vilma.datasets.robomimic_writer import file_attributes

        facts = file_attributes(path) or {}
    words = (("num_demos", "episodes"), ("total", "frames"))
    counts = [f"{facts[key]:,} {word}" for key, word in words if key in facts]
    return [("Data set", ", ".join([text, *counts]))]


def _versions() -> str:
    found = [f"vilma {vilma.__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


if __name__ == "__main__":
    raise SystemExit(main())

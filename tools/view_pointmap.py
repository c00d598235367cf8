"""Write a picture (and a PLY cloud) of one frame's point maps from a robomimic-layout HDF5 file.

One row for each camera: RGB, depth, the point map in false colours, and its points in 3-D.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from vilma.extras import require
from vilma.pointmap import Camera, PointMap, depth_problems
from vilma.pointmap.view import figure, write_ply

_SUFFIXES = ("image", "depth", "intrinsic", "extrinsic")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    frame = read_frame(options.episodes, options.episode, options.frame, options.cameras)
    maps, images, depths = {}, {}, {}
    for name, (image, depth, intrinsic, extrinsic) in frame.items():
        for problem in depth_problems(depth):
            print(f"warning: {name}_depth: {problem}")
        camera = Camera(intrinsic, extrinsic, depth.shape)
        seen = PointMap.from_depth(depth, camera, tuple(options.depth_range), frame=options.reference_frame)
        maps[name] = seen.crop(np.reshape(options.workspace, (2, 3))) if options.workspace else seen
        images[name], depths[name] = image, depth
    title = f"{Path(options.episodes).name}  {options.episode}  frame {options.frame}"
    print(figure(images, depths, maps, options.out, title))
    if options.ply:
        clouds = [maps[name].to_cloud(colors=images[name]) for name in maps]
        points, colors = (torch.cat(parts) for parts in zip(*clouds, strict=True))
        print(f"{write_ply(points, colors, options.ply)}  {len(points)} points")
    return 0


def read_frame(
    path: str, episode: str, frame: int, cameras: list[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Camera -> RGB (H, W, 3) uint8, depth (H, W) metres, intrinsics (3, 3), pose (4, 4) of one frame.

    ``cameras`` defaults to all that have depth and geometry. Raises ValueError naming what the file offers
    instead.
    """
    h5py = require("h5py", "robot")
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 (truncated, or another format): {error}") from error
    with file:
        if "data" not in file:
            raise ValueError(
                f"{path} has no group 'data': not a robomimic-layout file (it has {sorted(file)})"
            )
        episodes = sorted(file["data"], key=lambda name: (len(name), name))
        if episode not in file["data"]:
            raise ValueError(f"{path} has no episode {episode!r}; it has {_listed(episodes)}")
        observations = file["data"][episode].get("obs", {})
        found = sorted(key.removesuffix("_image") for key in observations if key.endswith("_image"))
        complete = [name for name in found if all(f"{name}_{suffix}" in observations for suffix in _SUFFIXES)]
        if not (cameras or complete):
            raise ValueError(
                f"{path} {episode} has no camera with depth and geometry (of: {_listed(found) or 'none'}); "
                "a point map needs <camera>_depth, <camera>_intrinsic and <camera>_extrinsic under obs"
            )
        views = {}
        for name in cameras or complete:
            missing = [f"{name}_{suffix}" for suffix in _SUFFIXES if f"{name}_{suffix}" not in observations]
            if missing:
                raise ValueError(
                    f"{path} {episode} lacks {', '.join(missing)}; complete cameras: {_listed(complete)}"
                )
            length = len(observations[f"{name}_image"])
            if not -length <= frame < length:
                raise ValueError(f"{path} {episode} has frames 0 to {length - 1}, got --frame {frame}")
            image, depth, intrinsic, extrinsic = (
                observations[f"{name}_{s}"][frame % length] for s in _SUFFIXES
            )
            depth = depth.reshape(depth.shape[:2])
            if image.shape[:2] != depth.shape:
                raise ValueError(
                    f"{path} {episode} {name}: image {image.shape[:2]} and depth {depth.shape} differ in "
                    "size; one camera's RGB and depth must share the view"
                )
            views[name] = image, depth, intrinsic, extrinsic
        return views


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma view-pointmap", description=__doc__)
    parser.add_argument(
        "episodes", help="HDF5 file with <camera>_{image,depth,intrinsic,extrinsic} under obs"
    )
    parser.add_argument("--episode", default="demo_0", help="default: %(default)s")
    parser.add_argument("--frame", type=int, default=0, help="row of the episode, negative from its end")
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="default: all with depth and geometry")
    parser.add_argument("--depth-range", nargs=2, type=float, default=(0.01, 5.0), metavar=("NEAR", "FAR"))
    parser.add_argument(
        "--workspace", nargs=6, type=float, metavar="M", help="show only x y z (minima) to x y z"
    )
    parser.add_argument("--reference-frame", default="world", help="what the poses lead to, for the labels")
    parser.add_argument("--out", default="pointmap.png", help="the picture, default: %(default)s")
    parser.add_argument("--ply", help="also write the cloud of all cameras, coloured, in the reference frame")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""Show point maps: a picture, a page to turn with the mouse, a PLY cloud, of an episode or an RGB-D frame.

SOURCE is a robomimic-layout HDF5 file, an npz file with rgb, depth, intrinsics (and pose), the word
"motorcycle" (a real stereo pair with true depth, out of scikit-image), or a colour picture with --depth and
--intrinsics. The picture has one row for each camera: RGB, depth, the point map in false colours, normals,
validity, and its points from two sides.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from vilma.extras import require
from vilma.pointmap import Camera, PointMap, depth_problems
from vilma.pointmap.ply import write_ply
from vilma.pointmap.view import figure

_SUFFIXES = ("image", "depth", "intrinsic", "extrinsic")

Views = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if Path(options.source).suffix in (".hdf5", ".h5") or not _is_single(options):
        views = read_frame(options.source, options.episode, options.frame, options.cameras)
        reference_frame, title = options.reference_frame or "world", Path(options.source).name
        title += f"  {options.episode}  frame {options.frame}"
    else:
        views, reference_frame = _single(options)
        title = Path(options.source).name
    for name, (_, depth, intrinsic, _) in views.items():
        for problem in depth_problems(depth, intrinsic):
            print(f"warning: {name + '_' if name else ''}depth: {problem}")
    maps = _maps(views, options, reference_frame)
    images, depths = ({name: view[k] for name, view in views.items()} for k in (0, 1))
    print(figure(images, depths, maps, options.out, title, full=True))
    if options.ply:
        clouds = [maps[name].to_cloud(colors=images[name]) for name in maps]
        points, colors = (torch.cat(parts) for parts in zip(*clouds, strict=True))
        normals = [maps[name].normals()[0][maps[name].valid] for name in maps]
        ply = write_ply(points, colors, options.ply, torch.cat(normals), binary=not options.ascii)
        print(f"{ply}  {len(points)} points")
    if options.html:
        _write_page(views, maps, reference_frame, title, options)
    return 0


def _is_single(options: argparse.Namespace) -> bool:
    return options.source == "motorcycle" or options.depth is not None or options.source.endswith(".npz")


def _single(options: argparse.Namespace) -> tuple[Views, str]:
    """One RGB-D frame as the only, nameless view."""
    from vilma.pointmap import rgbd_files

    if options.depth is not None:
        if options.intrinsics is None:
            raise ValueError("--depth needs --intrinsics FX FY CX CY, in pixels of the depth picture")
        frame = rgbd_files.read_pictures(
            options.source, options.depth, tuple(options.intrinsics), options.depth_scale
        )
    elif options.source == "motorcycle":
        frame = rgbd_files.motorcycle()
    else:
        if not Path(options.source).is_file():
            raise ValueError(f"no such file: {options.source}")
        frame = rgbd_files.read_npz(options.source)
    intrinsics, pose = (x.float().numpy() for x in (frame.camera.intrinsics, frame.camera.pose))
    return {"": (frame.rgb, frame.depth, intrinsics, pose)}, options.reference_frame or frame.reference_frame


def _maps(views: Views, options: argparse.Namespace, reference_frame: str) -> dict[str, PointMap]:
    maps = {}
    for name, (_, depth, intrinsic, extrinsic) in views.items():
        camera = Camera(intrinsic, extrinsic, depth.shape)
        seen = PointMap.from_depth(depth, camera, tuple(options.depth_range), frame=reference_frame)
        maps[name] = seen.crop(np.reshape(options.workspace, (2, 3))) if options.workspace else seen
    return maps


def _write_page(
    views: Views,
    maps: dict[str, PointMap],
    reference_frame: str,
    title: str,
    options: argparse.Namespace,
) -> None:
    from vilma.pointmap.orbit import Shot, write_orbit

    def shots(views: Views, maps: dict[str, PointMap]) -> dict[str, Shot]:
        return {
            name: Shot(maps[name], image, Camera(intrinsic, extrinsic, depth.shape))
            for name, (image, depth, intrinsic, extrinsic) in views.items()
        }

    moments = [shots(views, maps)]
    if options.every:
        if _is_single(options):
            raise ValueError("--every walks through an episode; a single frame has one moment")
        length = episode_length(options.source, options.episode)
        moments, title = [], f"{Path(options.source).name}  {options.episode}"
        for row in range(0, length, options.every):
            views = read_frame(options.source, options.episode, row, options.cameras)
            moments.append(shots(views, _maps(views, options, reference_frame)))
    page = write_orbit(moments, options.html, title)
    print(f"{page}  {len(moments)} moment{'s' * (len(moments) > 1)}, {page.stat().st_size / 1e6:.1f} MB")


def episode_length(path: str, episode: str) -> int:
    """Frames of an episode that `read_frame` can read."""
    with require("h5py", "robot").File(path, "r") as file:
        observations = file["data"][episode]["obs"]
        return min(len(observations[key]) for key in observations if key.endswith("_image"))


def read_frame(path: str, episode: str, frame: int, cameras: list[str] | None = None) -> Views:
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
    parser.add_argument("source", help="HDF5 episodes, npz frame, colour picture, or the word motorcycle")
    parser.add_argument("--episode", default="demo_0", help="default: %(default)s")
    parser.add_argument("--frame", type=int, default=0, help="row of the episode, negative from its end")
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="default: all with depth and geometry")
    parser.add_argument(
        "--depth", metavar="PNG", help="16-bit depth picture that belongs to a colour picture"
    )
    parser.add_argument("--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"))
    parser.add_argument("--depth-scale", type=float, default=0.001, help="metres of one unit of --depth")
    parser.add_argument("--depth-range", nargs=2, type=float, default=(0.01, 5.0), metavar=("NEAR", "FAR"))
    parser.add_argument(
        "--workspace", nargs=6, type=float, metavar="M", help="show only x y z (minima) to x y z"
    )
    parser.add_argument("--reference-frame", help="what the poses lead to, for the labels (world, camera)")
    parser.add_argument("--out", default="pointmap.png", help="the picture, default: %(default)s")
    parser.add_argument("--html", help="also write a page that turns the clouds with the mouse")
    parser.add_argument(
        "--every", type=int, metavar="N", help="the page holds each N-th frame of the whole episode"
    )
    parser.add_argument("--ply", help="also write the cloud of all cameras, coloured, in the reference frame")
    parser.add_argument("--ascii", action="store_true", help="the PLY cloud as text")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

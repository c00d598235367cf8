"""A look at a first batch: geometry in another convention trains without an error and fails in silence.

B batch, To observation steps, H, W rows and columns. Everything here is a heuristic: it warns, names the key
and says what to do; it never raises for the values of a batch.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .camera import Camera, as_tensor, check_rigid, invert_rigid, opencv_from_opengl
from .depth import depth_problems
from .point_map import PointMap

_PARTS = ("images", "depth", "intrinsics", "pose")
_FRAMES = 6  # of a batch that are looked at
_GRID = 40  # points along each side of a picture whose place in the world is looked at

_OTHER_POSES = {
    "a pose with OpenGL axes (y up, z backward); multiply it by diag(1, -1, -1, 1) from the right": (
        opencv_from_opengl
    ),
    "an OpenCV view matrix (reference -> camera); invert it": invert_rigid,
    "an OpenGL view matrix (reference -> camera); invert it, then multiply it by diag(1, -1, -1, 1) from "
    "the right (Camera.from_opengl does both)": lambda pose: opencv_from_opengl(invert_rigid(pose)),
}


class GeometryWarning(UserWarning):
    """The images, depth, intrinsics or poses of a batch look wrong."""


@dataclass
class _Scene:
    """What one camera saw, where its keys let it be told."""

    depth: Tensor | None = None  # (F, h, w), thinned
    camera: Camera | None = None  # (F,) of the thinned depth
    poses: dict[str, Tensor] = field(default_factory=dict)


def warn_about_geometry(
    batch: Mapping[str, Any],
    cameras: Iterable[str] | None = None,
    *,
    reference_frame: str = "world",
    depth_range: tuple[float, float] | None = None,
    workspace: Any = None,
    stacklevel: int = 2,
) -> dict[str, list[str]]:
    """`geometry_problems`, each key's as one `GeometryWarning`; returns them."""
    problems = geometry_problems(
        batch, cameras, reference_frame=reference_frame, depth_range=depth_range, workspace=workspace
    )
    for key, texts in problems.items():
        warnings.warn(f"{key}: {'; '.join(texts)}", GeometryWarning, stacklevel=stacklevel)
    return problems


def geometry_problems(
    batch: Mapping[str, Any],
    cameras: Iterable[str] | None = None,
    *,
    reference_frame: str = "world",
    depth_range: tuple[float, float] | None = None,
    workspace: Any = None,
) -> dict[str, list[str]]:
    """Key -> what looks wrong with it, for a batch (B, To, ...) of the house's observation keys.

    cameras: by default all that the keys name. reference_frame: "world" and "base" have z up; poses are not
    looked at for "camera". depth_range, workspace ((xmin, ymin, zmin), (xmax, ymax, zmax)): those of the
    policy; they tell more.

    Told: pictures and geometry of different size; depth that is a z-buffer, millimetres, distances or has
    points behind the camera; intrinsics of another image size; poses that are not rigid, are transposed, have
    OpenGL axes or lead the wrong way.
    """
    found: dict[str, list[str]] = {}
    names = sorted({key.split(".", 2)[2] for key in batch if _part(key) in ("images", "depth")})
    scenes = {}
    for name in names if cameras is None else cameras:
        parts = {part: batch.get(f"observation.{part}.{name}") for part in _PARTS}
        parts = {part: value for part, value in parts.items() if _is_picture(value)}
        images, raw = parts.pop("images", None), parts.get("depth")
        images = None if images is None else torch.as_tensor(images)
        values = {part: as_tensor(value).detach().cpu() for part, value in parts.items()}
        if raw is not None and raw.ndim > 3 and raw.shape[-1] == 1:
            values["depth"] = values["depth"][..., 0]
        problems = {
            "images": _image_problems(images, values.get("depth")),
            "depth": _depth_problems(values, depth_range, raw),
            "intrinsics": _intrinsics_problems(values, images),
            "pose": _pose_problems(values) if reference_frame != "camera" else [],
        }
        found |= {f"observation.{part}.{name}": texts for part, texts in problems.items() if texts}
        if reference_frame != "camera" and not any(problems[k] for k in ("depth", "intrinsics", "pose")):
            scene = _scene(values)
            if scene is not None:
                scenes[name] = scene
    for name, text in _misplaced(scenes, workspace, reference_frame).items():
        found.setdefault(f"observation.pose.{name}", []).append(text)
    return found


def _is_picture(value: Any) -> bool:
    """Whether there is something to look at; the policy says what is wrong with anything else."""
    return len(getattr(value, "shape", ())) >= 2 and 0 not in value.shape


def _part(key: str) -> str:
    parts = key.split(".", 2)
    return parts[1] if len(parts) == 3 and parts[0] == "observation" else ""


def _frames(values: Tensor, last: int) -> Tensor:
    """(F, ...) of (B, To, ...): some samples, their last step; ``last`` trailing dimensions belong to one."""
    values = values.reshape(-1, *values.shape[-last:]) if values.ndim != last + 2 else values[:, -1]
    return values[:: max(1, len(values) // _FRAMES)][:_FRAMES]


def _image_problems(images: Any, depth: Tensor | None) -> list[str]:
    if images is None:
        return []
    shape, problems = tuple(images.shape), []
    if shape[-3:-2] != (3,):
        if shape[-1:] == (3,):
            return [f"the shape {shape} ends in the colours: wanted (B, To, 3, H, W), move the last axis"]
        return [f"the shape {shape} has no three colours before H and W: wanted (B, To, 3, H, W)"]
    if depth is not None and depth.shape[-2:] != shape[-2:]:
        problems.append(
            f"the pictures are {shape[-2]} x {shape[-1]} and the depth is {depth.shape[-2]} x "
            f"{depth.shape[-1]} (H x W): colour and geometry of one camera share one view; resize both, and "
            "K with Camera.resize"
        )
    if images.is_floating_point() and float(images.max()) > 1.5:
        problems.append(
            f"floating point values up to {float(images.max()):.4g}: wanted [0, 1], divide by 255, or uint8"
        )
    return problems


def _depth_problems(
    values: Mapping[str, Tensor], depth_range: tuple[float, float] | None, raw: Any
) -> list[str]:
    if "depth" not in values:
        return []
    depth = values["depth"]
    if depth.shape != raw.shape:
        return [f"the shape {tuple(raw.shape)}: wanted (B, To, H, W); drop the axis of length one"]
    intrinsics = values.get("intrinsics")
    if intrinsics is not None and intrinsics.shape[-2:] == (3, 3):
        intrinsics = _frames(intrinsics, 2)
    else:
        intrinsics = None
    shown = _frames(depth, 2)
    if not torch.as_tensor(raw).is_floating_point():
        shown = shown.int()  # whole numbers tell more than their values
    problems = depth_problems(
        shown, intrinsics if intrinsics is not None and len(intrinsics) == len(shown) else None
    )
    if depth_range is not None and not problems:
        near, far = depth_range
        inside = float(((depth > near) & (depth < far)).float().mean())
        if inside < 0.01:
            problems.append(
                f"only {inside:.2%} of the pixels lie in the depth range {near:g} to {far:g} m, the median "
                f"is {float(depth[depth > 0].median()):.3g}: another unit, or another range?"
            )
    return problems


def _intrinsics_problems(values: Mapping[str, Tensor], images: Any) -> list[str]:
    if "intrinsics" not in values:
        return []
    intrinsics = values["intrinsics"]
    if intrinsics.shape[-2:] != (3, 3):
        return [f"the shape {tuple(intrinsics.shape)}: wanted (B, To, 3, 3)"]
    seen = values.get("depth", images)
    if seen is None:
        return []
    height, width = seen.shape[-2:]
    k = _frames(intrinsics, 2)[0].double()
    if not bool(k.isfinite().all()) or k[2].tolist() != [0, 0, 1] or k[1, 0] != 0 or 0 in (k[0, 0], k[1, 1]):
        rows = "transposed; transpose them" if k[:, 2].tolist() == [0, 0, 1] else "not a pinhole camera's"
        return [f"{k.tolist()} are {rows}: wanted [[fx, s, cx], [0, fy, cy], [0, 0, 1]]"]
    fx, cx, fy, cy = k[0, 0], k[0, 2], k[1, 1], k[1, 2]
    told = f"focal lengths ({fx:.4g}, {fy:.4g}) and principal point ({cx:.4g}, {cy:.4g})"
    if max(abs(fx), abs(fy)) < 4 and max(cx, cy) <= 1.5:
        return [
            f"{told} are fractions of the image: multiply the first row by the width, {width}, and the "
            f"second by the height, {height}"
        ]
    off = max(abs(cx / width - 0.5), abs(cy / height - 0.5))
    if off > 0.24:  # K of half the size is off by a quarter
        other = f"{2 * cy:.0f} x {2 * cx:.0f}"
        return [
            f"the principal point ({cx:.4g}, {cy:.4g}) is far from the centre of {height} x {width} pixels: "
            f"do they belong to pictures of about {other} (H x W)? Camera(K, pose, that size).resize("
            f"({height}, {width})) rescales them; for a cropped picture use Camera.crop"
        ]
    if abs(fx) * 2 < 0.2 * width or abs(fx) > 30 * width:
        return [f"{told} mean a field of view that no camera has at {height} x {width} pixels; another size?"]
    if not 0.5 < abs(fx / fy) < 2:
        return [f"{told}: pixels {max(abs(fx / fy), abs(fy / fx)):.1f} times as long as wide; rows swapped?"]
    return []


def _pose_problems(values: Mapping[str, Tensor]) -> list[str]:
    if "pose" not in values:
        return []
    pose = values["pose"]
    if pose.shape[-2:] != (4, 4):
        return [f"the shape {tuple(pose.shape)}: wanted (B, To, 4, 4), camera -> reference frame"]
    pose = _frames(pose, 2)
    try:
        check_rigid(pose, "pose")
    except ValueError as error:
        try:
            check_rigid(pose.mT, "pose")
        except ValueError:
            return [str(error)]
        return ["the matrices are transposed (translation in the last row): transpose them"]
    return []


def _scene(values: Mapping[str, Tensor]) -> _Scene | None:
    if any(part not in values for part in ("depth", "intrinsics", "pose")):
        return None
    depth, intrinsics = _frames(values["depth"], 2), _frames(values["intrinsics"], 2)
    pose, size = _frames(values["pose"], 2), tuple(depth.shape[-2:])
    if not len(depth) == len(intrinsics) == len(pose):
        return None
    small = tuple(min(_GRID, n) for n in size)
    camera = Camera(intrinsics.float(), pose.float(), size, check=False)
    rows, columns = (torch.arange(n) * full // n for n, full in zip(small, size))
    scene = _Scene(depth.float()[:, rows][:, :, columns], camera.resize(small))
    scene.poses = {"": scene.camera.pose} | {text: f(scene.camera.pose) for text, f in _OTHER_POSES.items()}
    return scene


def _points(scene: _Scene, reading: str) -> PointMap:
    camera = Camera(scene.camera.intrinsics, scene.poses[reading], scene.camera.size, check=False)
    return PointMap.from_depth(scene.depth, camera)


def _misplaced(scenes: Mapping[str, _Scene], workspace: Any, reference_frame: str) -> dict[str, str]:
    """Camera -> what its points say about its pose, the strongest evidence alone."""
    found, empty = {}, {}
    for name, scene in scenes.items():
        if workspace is not None:
            box = torch.as_tensor(workspace, dtype=torch.float32)
            shares = {
                text: float(seen.crop(box).valid.sum() / seen.valid.sum().clamp_min(1))
                for text in scene.poses
                for seen in [_points(scene, text)]
            }
            said = _verdict(shares, 0.01, 0.15, "of the points lie in the workspace")
            if said:
                found[name] = said
            elif shares[""] == 0:
                empty[name] = (
                    f"no point lies in the workspace {_listed(box)} of the {reference_frame} frame: are the "
                    "poses those of another frame, or is the workspace?"
                )
    if not found and scenes:
        shares = {text: _agreement(scenes, text) for text in next(iter(scenes.values())).poses}
        if None not in shares.values():
            # Cameras that see each other's points badly may just look past each other, and then do so under
            # every reading; one reading that fits well beats another that fits by halves.
            best = max(shares.values())
            few = 0.6 * best if best > 0.7 else 0.15
            said = _verdict(shares, few, 0.5, "of one view's points lie where another view shows them")
            found = dict.fromkeys(scenes, said) if said else {}
    for name, scene in scenes.items():
        if name in found:
            continue
        shares = {}
        for text, pose in scene.poses.items():
            seen = _points(scene, text)
            lower = (seen.points[..., 2] < pose[:, None, None, 2, 3]) & seen.valid
            shares[text] = float(lower.sum() / seen.valid.sum().clamp_min(1))
        said = _verdict(
            shares, 0.1, 0.9, "of the points lie lower than the camera, which looks away from them"
        )
        if said:
            found[name] = said
    return empty | found


def _listed(box: Tensor) -> str:
    return " to ".join("(" + ", ".join(f"{x:g}" for x in corner) + ")" for corner in box.tolist())


def _verdict(shares: Mapping[str, float], few: float, many: float, words: str) -> str | None:
    """What to say when few as given but many under another reading; ``shares[""]`` is as given."""
    better = {text: share for text, share in shares.items() if text and share >= many}
    if shares[""] > few or not better:
        return None
    best = max(better, key=better.get)
    others = [
        text.split(";")[0] for text, share in better.items() if text != best and share > 0.8 * better[best]
    ]
    also = f" (or {', or '.join(others)})" if others else ""
    return f"as given, {shares['']:.0%} {words}; {better[best]:.0%} do if it is {best}{also}"


def _agreement(scenes: Mapping[str, _Scene], reading: str) -> float | None:
    """The share of points that another view, from elsewhere, shows at their depth; None with one view only.

    Views are the cameras of a sample, and one moving camera at two samples.
    """
    shares = []
    names = list(scenes)
    pairs = [(a, b, 0) for a in names for b in names if a != b] + [(a, a, 1) for a in names]
    for source, target, later in pairs:
        s, t = scenes[source], scenes[target]
        count = min(len(s.depth), len(t.depth)) - later
        if count < 1:
            continue
        ours, theirs = s.poses[reading][:count], t.poses[reading][later : later + count]
        apart = (s.camera.pose[:count] - t.camera.pose[later : later + count]).abs().amax((1, 2)) > 0.02
        if not bool(apart.any()):
            continue
        seen = PointMap.from_depth(
            s.depth[:count], Camera(s.camera.intrinsics[:count], ours, s.camera.size, check=False)
        )
        other = Camera(t.camera.intrinsics[later : later + count], theirs, t.camera.size, check=False)
        uv, z = other.project(seen.points)
        height, width = other.size
        u, v = uv.nan_to_num(-9).round().unbind(-1)
        inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & seen.valid & apart[:, None, None]
        index = torch.where(inside, v * width + u, 0).long().flatten(1)
        shown = t.depth[later : later + count].flatten(1).gather(1, index).view_as(z)
        matches = inside & ((shown - z).abs() < 0.03 * shown + 0.005)
        shares.append(float(matches.sum() / (seen.valid & apart[:, None, None]).sum().clamp_min(1)))
    return max(shares) if shares else None

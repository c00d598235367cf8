"""Random changes of RGB-D views that keep picture and geometry together.

N: samples; all that follows in a tensor's shape (time steps) changes together. Each sample draws from its own
seed by a hash, so what becomes of it depends neither on its neighbours in the batch nor on the device.
"""

import math
import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .camera import Camera, compose
from .repose import repose

_GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """What is changed, and at most by how much; everything is off by default.

    shift: whole pixels in each direction, borders padded (DrQ, arXiv 2004.13649); ``camera_shift`` replaces
    it for cameras by name. crop: (height, width) of a random window; in evaluation the middle one.

    brightness, contrast, saturation: factors within 1 +- this. hue: turns of the colour circle within +-
    this, at most 0.5. Pictures only.

    frame_translation, frame_rotation: metres and degrees by which the reference frame is displaced, the same
    for all cameras of a sample, about ``frame_pivot``. ``frame_axes`` are the shares of the translation along
    x, y and z: (1, 1, 0) keeps the heights. `frame_jitter` gives the transform for whatever else is written
    in that frame.

    camera_translation, camera_rotation: metres and degrees by which a camera is moved, one draw a camera and
    sample; the picture and its depth are rendered anew from there (`repose`). repose_probability: of a sample
    to be re-posed at all. repose_cameras: only these; empty means all.

    faithful: the shift moves the pictures alone, as PointMapPolicy's published training does (RGB and points
    are then misaligned by up to ``shift`` pixels). Otherwise points move along.
    """

    shift: int = 0
    camera_shift: dict[str, int] = field(default_factory=dict)
    crop: tuple[int, int] | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    frame_translation: float = 0.0
    frame_rotation: float = 0.0
    frame_pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)
    frame_axes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    camera_translation: float = 0.0
    camera_rotation: float = 0.0
    repose_probability: float = 1.0
    repose_cameras: tuple[str, ...] = ()
    faithful: bool = False

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("brightness", "contrast", "saturation", "repose_probability"), 1.0)
        limits |= {"hue": 0.5, "frame_rotation": 180.0, "camera_rotation": 45.0}
        limits |= dict.fromkeys(("shift", "frame_translation", "camera_translation"), math.inf)
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between 0 and {most:g}, got {getattr(self, name)}")
        if not all(0 <= share <= 1 for share in self.frame_axes):
            raise ValueError(f"frame_axes are shares between 0 and 1, got {list(self.frame_axes)}")
        if any(pixels < 0 for pixels in self.camera_shift.values()):
            raise ValueError(f"camera_shift counts pixels and cannot be negative, got {self.camera_shift}")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop must be (height, width) of at least 1 x 1, got {self.crop}")

    @property
    def moves_cameras(self) -> bool:
        return (self.camera_translation > 0 or self.camera_rotation > 0) and self.repose_probability > 0

    @property
    def moves_frame(self) -> bool:
        return (self.frame_translation > 0 and any(self.frame_axes)) or self.frame_rotation > 0


@dataclass(frozen=True, eq=False)
class View:
    """One camera's pictures of N samples, each part where the policy uses it.

    rgb (N, ..., 3, H, W), uint8 or float in [0, 1]; depth (N, ..., H, W), metres, 0 or non-finite = no
    reading; camera: (N, ...) of that depth. ``name`` of the camera picks its options and its random numbers.
    """

    rgb: Tensor | None = None
    depth: Tensor | None = None
    camera: Camera | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.rgb is None and self.depth is None:
            raise ValueError("a view needs rgb or depth")
        if (self.depth is None) != (self.camera is None):
            raise ValueError("depth and camera belong together: give both or neither")
        if self.depth is not None and self.camera.size != tuple(self.depth.shape[-2:]):
            raise ValueError(f"the camera is of size {self.camera.size}, depth is {tuple(self.depth.shape)}")
        both = self.rgb is not None and self.depth is not None
        if both and (self.rgb.shape[:-3], self.rgb.shape[-2:]) != (
            self.depth.shape[:-2],
            self.depth.shape[-2:],
        ):
            raise ValueError(
                "images and depth must share samples and size, got "
                f"{tuple(self.rgb.shape)}, {tuple(self.depth.shape)}"
            )

    @property
    def size(self) -> tuple[int, int]:
        return tuple((self.depth if self.rgb is None else self.rgb).shape[-2:])

    def __len__(self) -> int:
        return len(self.depth if self.rgb is None else self.rgb)


def augment_view(view: View, config: AugmentConfig, seeds: Tensor, training: bool = True) -> View:
    """The view after re-posing, frame jitter, shift, crop and colour jitter, in this order.

    seeds (N,) int64, one a sample and shared by its cameras: `random_seeds` or `sample_seeds`. With
    ``training=False`` only the crop is done, in the middle.

    Raises ValueError for sizes that do not fit and for a shift or crop larger than the picture.
    """
    if seeds.shape != (len(view),) or seeds.dtype != torch.int64:
        raise ValueError(
            f"seeds must be int64 of shape ({len(view)},), got {seeds.dtype} {tuple(seeds.shape)}"
        )
    if training:
        view = _reposed(view, config, seeds)
        if config.moves_frame and view.camera is not None:
            transform = _beside(frame_jitter(config, seeds), view.camera)
            pose = compose(transform.to(view.camera.pose), view.camera.pose)
            view = replace(view, camera=replace(view.camera, pose=pose, check=False))
        view = _shifted_view(view, config, seeds)
    if config.crop is not None:
        view = _cropped(view, config, seeds, training)
    if training and view.rgb is not None:
        view = replace(view, rgb=_jittered(view.rgb, config, seeds))
    return view


def random_seeds(
    count: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Seeds (count,) from a generator, by default torch's own (whose state a checkpoint keeps)."""
    drawn = torch.randint(0, 2**62, (count,), generator=generator, device=generator and generator.device)
    return drawn.to(device)


def sample_seeds(seed: int, *numbers: int | Tensor) -> Tensor:
    """Seeds (N,) made from a run's seed and, e.g., the step and the samples' indices (N,)."""
    state = torch.tensor(seed, dtype=torch.int64)
    for number in numbers:
        number = torch.as_tensor(number)
        state = _mixed(state.to(number.device) ^ _mixed(number.long() + 1))
    return torch.atleast_1d(state) & (2**62 - 1)


def frame_jitter(config: AugmentConfig, seeds: Tensor) -> Tensor:
    """(N, 4, 4) float32: what `augment_view` applies to the reference frame of these samples."""
    motion = _small_motion(seeds, "frame", config.frame_translation, config.frame_rotation)
    motion[:, :3, 3] *= torch.tensor(config.frame_axes, device=seeds.device)
    pivot = torch.tensor(config.frame_pivot, device=seeds.device)
    motion[:, :3, 3] += pivot - (motion[:, :3, :3] * pivot).sum(-1)
    return motion


def random_shift(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift every sample of images (N, ..., C, H, W) by whole pixels in [-pad, pad], borders replicated.

    Shift augmentation of DrQ (arXiv 2004.13649). On images alone it breaks the pixel correspondence with a
    point map by up to ``pad`` pixels; that is what PointMapPolicy's published training does.
    `random_shift_rgbd` keeps it.
    """
    if images.ndim < 4:
        raise ValueError(f"images must have shape (N, ..., C, H, W), got {tuple(images.shape)}")
    config = AugmentConfig(shift=pad)
    return _shifted_view(View(images), config, random_seeds(len(images), generator, images.device)).rgb


def random_shift_rgbd(
    images: Tensor, depth: Tensor, intrinsics: Tensor, pad: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same shift for images (N, ..., C, H, W), depth (N, ..., H, W) and intrinsics (N, ..., 3, 3).

    Images replicate their border; depth gets 0 there, no reading, since a replicated depth would lie on
    another ray. The principal point moves along, so every remaining pixel unprojects to the point it showed
    before.
    """
    pose = torch.eye(4, dtype=intrinsics.dtype, device=intrinsics.device)
    camera = Camera(intrinsics, pose, tuple(depth.shape[-2:]), check=False)
    view = View(images, depth, camera)
    if intrinsics.shape[0] != images.shape[0] or intrinsics.shape[-2:] != (3, 3):
        raise ValueError(
            f"intrinsics must have shape ({images.shape[0]}, ..., 3, 3), got {tuple(intrinsics.shape)}"
        )
    seeds = random_seeds(len(images), generator, images.device)
    view = _shifted_view(view, AugmentConfig(shift=pad), seeds)
    return view.rgb, view.depth, view.camera.intrinsics


def _reposed(view: View, config: AugmentConfig, seeds: Tensor) -> View:
    chosen = not config.repose_cameras or view.name in config.repose_cameras
    if view.depth is None or not (config.moves_cameras and chosen):
        return view
    stream = f"camera/{view.name}"
    motion = _small_motion(seeds, stream, config.camera_translation, config.camera_rotation)
    still = _uniform(seeds, f"{stream}/still", 1)[:, :, None] >= config.repose_probability
    motion = torch.where(still, torch.eye(4, device=motion.device), motion)
    pose = compose(view.camera.pose, _beside(motion, view.camera).to(view.camera.pose))
    rgb, depth, camera = repose(view.rgb, view.depth, view.camera, pose)
    # Untouched samples keep their very pixels.
    still = still[:, 0, 0]
    depth = torch.where(still.view(-1, *[1] * (depth.ndim - 1)), view.depth, depth)
    if rgb is not None:
        rgb = torch.where(still.view(-1, *[1] * (rgb.ndim - 1)), view.rgb, rgb)
    return replace(view, rgb=rgb, depth=depth, camera=camera)


def _shifted_view(view: View, config: AugmentConfig, seeds: Tensor) -> View:
    pad = config.camera_shift.get(view.name, config.shift)
    if not pad:
        return view
    if pad >= min(view.size):
        raise ValueError(f"pad must be at least 0 and smaller than the image {view.size}, got {pad}")
    drawn = _uniform(seeds, f"shift/{view.name}", 2)
    rows, columns = ((drawn * (2 * pad + 1)).long().clamp(max=2 * pad) - pad).unbind(1)
    rgb = None if view.rgb is None else _window(view.rgb, rows, columns, view.size)
    if config.faithful or view.depth is None:
        return replace(view, rgb=rgb)
    depth, camera = _moved_depth(view, rows, columns, view.size)
    return View(rgb, depth, camera, view.name)


def _cropped(view: View, config: AugmentConfig, seeds: Tensor, training: bool) -> View:
    rooms = [have - want for have, want in zip(view.size, config.crop)]
    if min(rooms) < 0:
        raise ValueError(f"the crop {config.crop} is larger than the pictures, which are {view.size}")
    if training:
        drawn = _uniform(seeds, f"crop/{view.name}", 2)
    else:
        drawn = torch.full((len(view), 2), 0.5, device=seeds.device)
    limits = torch.tensor(rooms, device=drawn.device)
    rows, columns = torch.minimum((drawn * (limits + 1)).long(), limits).unbind(1)
    if not training:
        rows, columns = (torch.full_like(rows, room // 2) for room in rooms)
    rgb = None if view.rgb is None else _window(view.rgb, rows, columns, config.crop)
    if view.depth is None:
        return replace(view, rgb=rgb)
    depth, camera = _moved_depth(view, rows, columns, config.crop)
    return View(rgb, depth, camera, view.name)


def _moved_depth(view: View, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> tuple[Tensor, Camera]:
    """Depth and camera of the window at (rows, columns) of each sample; 0 outside the picture."""
    depth = _window(view.depth.unsqueeze(-3), rows, columns, size, replicate=False).squeeze(-3)
    between = [1] * (len(view.camera.batch_shape) - 1)
    camera = view.camera.shift(rows.view(-1, *between), columns.view(-1, *between))
    return depth, replace(camera, size=tuple(size), check=False)


def _window(
    images: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int], replicate: bool = True
) -> Tensor:
    """New pixel (v, u), (N, ..., C, *size), shows old pixel (v + rows, u + columns); outside, border or 0."""
    height, width = images.shape[-2:]
    flat = images.reshape(len(images), -1, height, width)
    v = torch.arange(size[0], device=images.device) + rows[:, None]
    u = torch.arange(size[1], device=images.device) + columns[:, None]
    sample = torch.arange(len(flat), device=images.device)[:, None, None]
    v_in, u_in = v.clamp(0, height - 1), u.clamp(0, width - 1)
    # Advanced indices around a slice come out in front: (N, H, W, C).
    out = flat[sample, :, v_in[:, :, None], u_in[:, None, :]].movedim(-1, 1)
    if not replicate:
        outside = (v != v_in)[:, None, :, None] | (u != u_in)[:, None, None, :]
        out = out.masked_fill(outside, 0)
    return out.reshape(*images.shape[:-2], *size)


def _jittered(rgb: Tensor, config: AugmentConfig, seeds: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order, as torchvision's functions define them."""
    names = ("brightness", "contrast", "saturation", "hue")
    if not any(getattr(config, name) for name in names):
        return rgb
    drawn = 2 * _uniform(seeds, "color", 4) - 1
    x = rgb if rgb.is_floating_point() else rgb.float() / 255
    shape = (-1, *[1] * (rgb.ndim - 1))
    factors = [(drawn[:, k] * getattr(config, name)).view(shape).to(x) for k, name in enumerate(names)]
    weights = x.new_tensor(_GRAY).view(3, 1, 1)
    if config.brightness:
        x = (x * (1 + factors[0])).clamp(0, 1)
    if config.contrast:
        mean = (x * weights).sum(-3, keepdim=True).mean((-2, -1), keepdim=True)
        x = torch.lerp(mean, x, 1 + factors[1]).clamp(0, 1)
    if config.saturation:
        x = torch.lerp((x * weights).sum(-3, keepdim=True), x, 1 + factors[2]).clamp(0, 1)
    if config.hue:
        x = _turned_hue(x, factors[3])
    return x if rgb.is_floating_point() else (x * 255).round().to(rgb.dtype)


def _turned_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue moved round the colour circle in HSV; value and saturation stay."""
    r, g, b = x.unbind(-3)
    value, low = x.amax(-3), x.amin(-3)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    sixth = sixth + 6 * turns.squeeze(-3)
    planes = []
    for n in (5, 3, 1):
        k = (n + sixth) % 6
        planes.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(planes, dim=-3)


def _small_motion(seeds: Tensor, stream: str, metres: float, degrees: float) -> Tensor:
    """Rigid motions (N, 4, 4) float32: translation and rotation vector uniform in balls of these radii."""
    drawn = _uniform(seeds, stream, 6)
    motion = torch.zeros(len(seeds), 4, 4, device=seeds.device)
    motion[:, :3, 3] = metres * _in_ball(drawn[:, :3])
    motion[:, :3, :3] = _rotation(math.radians(degrees) * _in_ball(drawn[:, 3:]))
    motion[:, 3, 3] = 1
    return motion


def _in_ball(uniform: Tensor) -> Tensor:
    """Points (N, 3) uniform in the unit ball from three uniform numbers each."""
    height, turn, radius = 2 * uniform[:, 0] - 1, 2 * math.pi * uniform[:, 1], uniform[:, 2] ** (1 / 3)
    across = (1 - height * height).sqrt()
    return radius[:, None] * torch.stack([across * turn.cos(), across * turn.sin(), height], dim=1)


def _rotation(vector: Tensor) -> Tensor:
    """Rodrigues' formula, (N, 3) rotation vectors in radians to (N, 3, 3)."""
    angle = torch.linalg.vector_norm(vector, dim=1).clamp_min(1e-12)[:, None, None]
    x, y, z = (vector / angle[:, 0]).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
    eye = torch.eye(3, device=vector.device)
    return eye + angle.sin() * cross + (1 - angle.cos()) * compose(cross, cross)


def _beside(motion: Tensor, camera: Camera) -> Tensor:
    """(N, 4, 4) shaped to broadcast with the camera's (N, ..., 4, 4)."""
    return motion.view(len(motion), *[1] * (len(camera.batch_shape) - 1), 4, 4)


def _uniform(seeds: Tensor, stream: str, count: int) -> Tensor:
    """(N, count) in [0, 1): number k of a named stream of each seed."""
    offset = zlib.crc32(stream.encode()) << 16
    counter = torch.arange(count, device=seeds.device) + offset
    bits = _mixed(_mixed(counter) ^ seeds[:, None])
    return (bits & (2**24 - 1)).float() / 2**24


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64, whose products wrap."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value

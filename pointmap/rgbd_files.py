"""Single RGB-D frames: an npz file, a pair of pictures, a stereo pair with its disparity."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vilma.extras import require

from .camera import Camera


class RGBDFrame(NamedTuple):
    """rgb (H, W, 3) uint8; depth (H, W) float32, metres along the optical axis, 0 = no reading; its camera;
    the frame that the camera's pose leads to."""

    rgb: np.ndarray
    depth: np.ndarray
    camera: Camera
    reference_frame: str = "camera"


def depth_from_disparity(
    disparity: np.ndarray, focal: float, baseline: float, offset: float = 0.0
) -> np.ndarray:
    """Metres of a rectified pair: focal baseline / (disparity + offset), 0 where there is no disparity.

    disparity (H, W), pixels; focal in pixels, baseline in metres; offset: the difference of the two principal
    points' columns, right minus left.
    """
    shifted = np.asarray(disparity, np.float64) + offset
    read = np.isfinite(shifted) & (shifted > 0)
    return np.where(read, focal * baseline / np.where(read, shifted, 1), 0).astype(np.float32)


def motorcycle() -> RGBDFrame:
    """The motorcycle of the Middlebury stereo benchmark of 2014, with true disparity, out of scikit-image.

    Calibration: as scikit-image documents it for its pictures, a quarter of the original size.
    """
    data = require("skimage.data", "viz")
    left, _, disparity = data.stereo_motorcycle()
    focal, cx, cy = 994.978, 311.193, 254.877
    depth = depth_from_disparity(disparity, focal, baseline=0.193001, offset=31.086)
    intrinsics = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    return RGBDFrame(left, depth, Camera(intrinsics, torch.eye(4), depth.shape))


def read_npz(path: str | os.PathLike) -> RGBDFrame:
    """A frame from an npz file with ``rgb`` (H, W, 3), ``depth`` (H, W), metres, ``intrinsics`` (3, 3), pixel
    centres at 0.5, and, if the points shall be in another frame than the camera's, ``pose`` (4, 4)."""
    try:
        with np.load(path) as file:
            values = {name: file[name] for name in ("rgb", "depth", "intrinsics", "pose") if name in file}
            absent = [name for name in ("rgb", "depth", "intrinsics") if name not in values]
            if absent:
                raise ValueError(f"{path} lacks {', '.join(absent)}; it has {', '.join(file.files)}")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as npz: {error}") from error
    depth = values["depth"].reshape(values["depth"].shape[:2])
    pose = values.get("pose")
    camera = Camera(values["intrinsics"], np.eye(4) if pose is None else pose, depth.shape)
    return _checked(values["rgb"], depth, camera, "camera" if pose is None else "world", path)


def read_pictures(
    rgb: str | os.PathLike,
    depth: str | os.PathLike,
    intrinsics: tuple[float, float, float, float],
    depth_scale: float = 0.001,
) -> RGBDFrame:
    """A frame from a colour picture and a 16-bit depth picture in units of ``depth_scale`` metres.

    intrinsics: fx, fy, cx, cy in pixels of the depth picture, pixel centres at 0 (OpenCV, sensors).
    """
    image = require("PIL.Image", "viz")
    for path in (rgb, depth):
        if not Path(path).is_file():
            raise ValueError(f"no such file: {path}")
    with image.open(rgb) as file:
        colors = np.array(file.convert("RGB"))
    with image.open(depth) as file:
        raw = np.array(file)
    if raw.ndim != 2:
        raise ValueError(f"{depth} has shape {raw.shape}: a depth picture has one channel")
    fx, fy, cx, cy = intrinsics
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    camera = Camera(matrix, torch.eye(4), raw.shape, pixel_center=0.0).with_pixel_center()
    return _checked(colors, raw * depth_scale, camera, "camera", rgb)


def _checked(rgb: np.ndarray, depth: np.ndarray, camera: Camera, frame: str, path) -> RGBDFrame:
    if rgb.shape != (*depth.shape, 3):
        raise ValueError(
            f"{path}: the picture is {rgb.shape} and the depth {depth.shape}; colour and depth must share "
            "one view, (H, W, 3) and (H, W)"
        )
    return RGBDFrame(rgb, depth.astype(np.float32), camera, frame)

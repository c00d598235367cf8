"""A policy of vilma in robomimic's own rollout loop (``robomimic.utils.train_utils.run_rollout``).

robomimic is optional and stays outside: ``pip install --no-deps robomimic six`` (a plain install of 0.3.0 may
replace torch). Its environments give observations under robosuite's names; the adapter turns them into the
house's keys and asks the environment for what an observation lacks, the camera matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vilma.extras import require

__all__ = ["rollout_policy"]


def rollout_policy(
    policy: Any, env: Any, *, task: str, state_keys: Sequence[str], cameras: Sequence[str]
) -> Any:
    """A ``robomimic.algo.RolloutPolicy`` that acts with ``policy``.

    Args:
        policy: of vilma, in evaluation mode; it reads what its ``observation_keys`` say.
        env: a robomimic environment. Where the policy reads depth, its observations must hold ``<cam>_depth``
            in metres (robomimic 0.5: ``use_depth_obs=True``), and it must have
            ``get_camera_intrinsic_matrix`` and ``get_camera_extrinsic_matrix``.
        task: the instruction.
        state_keys: what ``observation.state`` was made of in training; ``robot0_eef_rot6d`` is taken from
            ``robot0_eef_quat_site``.
        cameras: those of the policy.

    Raises:
        ImportError: robomimic is missing. ValueError: in an episode, for an observation that is missing.
    """
    base = require("robomimic.algo", "robomimic").RolloutPolicy

    class VilmaRolloutPolicy(base):
        def __init__(self) -> None:
            """robomimic's own constructor wants an algorithm of robomimic."""

        def start_episode(self) -> None:
            policy.reset()

        def __call__(self, ob: Mapping[str, Any], goal: Any = None) -> np.ndarray:
            observation = translate(ob, env, state_keys=state_keys, cameras=cameras)
            batch = {key: value[None] for key, value in observation.items()}
            action = policy.select_action({**batch, "task": [task]})
            return np.asarray(action.detach().cpu() if hasattr(action, "detach") else action)[0]

        def __repr__(self) -> str:
            return f"vilma {type(policy).__name__}"

    return VilmaRolloutPolicy()


def translate(
    ob: Mapping[str, Any], env: Any, *, state_keys: Sequence[str], cameras: Sequence[str]
) -> dict[str, np.ndarray]:
    """robomimic's observation of one environment under the house's keys, unbatched."""
    found: dict[str, np.ndarray] = {}
    for camera in cameras:
        if f"{camera}_image" in ob:
            found[f"observation.images.{camera}"] = _picture(np.asarray(ob[f"{camera}_image"]))
        if f"{camera}_depth" in ob:
            depth = np.asarray(ob[f"{camera}_depth"], np.float32).squeeze()
            found[f"observation.depth.{camera}"] = depth
            height, width = depth.shape
            intrinsics = env.get_camera_intrinsic_matrix(
                camera_name=camera, camera_height=height, camera_width=width
            )
            pose = env.get_camera_extrinsic_matrix(camera_name=camera)
            found[f"observation.intrinsics.{camera}"] = np.asarray(intrinsics, np.float32)
            found[f"observation.pose.{camera}"] = np.asarray(pose, np.float32)
    state = [np.zeros(0), *(np.atleast_1d(_reading(ob, key)) for key in state_keys)]
    found["observation.state"] = np.concatenate(state).astype(np.float32)
    return found


def _picture(image: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 from robomimic's processed (3, H, W) floats in [0, 1] or its raw (H, W, 3) uint8."""
    if image.dtype != np.uint8:
        image = np.round(255 * np.clip(image, 0.0, 1.0)).astype(np.uint8)
    return np.ascontiguousarray(image if image.shape[0] == 3 else image.transpose(2, 0, 1))


def _reading(ob: Mapping[str, Any], key: str) -> np.ndarray:
    if key in ob:
        return np.asarray(ob[key])
    if key == "robot0_eef_rot6d" and "robot0_eef_quat_site" in ob:
        return _rotation(np.asarray(ob["robot0_eef_quat_site"], np.float64))[:, :2].T.reshape(6)
    needed = "robot0_eef_quat_site" if key == "robot0_eef_rot6d" else key
    raise ValueError(
        f"the observation lacks {needed}, which observation.state is made of; it has: {', '.join(sorted(ob))}"
    )


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """(3, 3) of a quaternion (x, y, z, w)."""
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )

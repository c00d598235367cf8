"""Small LeRobot data sets, written by their published layouts (v2.1 and v3.0) with pyarrow and ffmpeg."""

import io
import json
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
HEIGHT, WIDTH = 24, 32
LENGTHS = (5, 3, 7)
TASKS = ("pick the cube", "open the drawer")


def episodes(seed=0, lengths=LENGTHS):
    """What the data sets hold: a list of dictionaries of arrays with T rows."""
    rng, made = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        pose = np.tile(np.eye(4), (length, 1, 1))
        pose[:, :3, 3] = rng.normal(size=(length, 3))
        made.append(
            {
                "task": TASKS[number % 2],
                "state": rng.normal(size=(length, 4)).astype(np.float32),
                "gripper": rng.normal(size=(length, 1)).astype(np.float32),
                "action": rng.normal(size=(length, 3)).astype(np.float32),
                "front": rng.integers(0, 255, (length, HEIGHT, WIDTH, 3), np.uint8),
                "wrist": rng.integers(0, 255, (length, HEIGHT, WIDTH, 3), np.uint8),
                "depth": rng.integers(300, 2000, (length, HEIGHT, WIDTH)).astype(np.uint16),
                "intrinsics": np.tile([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]], (length, 1, 1)),
                "pose": pose,
            }
        )
    return made


def features(geometry):
    names = ["height", "width", "channels"]
    found = {
        "observation.state": {"dtype": "float32", "shape": [4], "names": None},
        "gripper": {"dtype": "float32", "shape": [1], "names": None},
        "action": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "observation.images.front": {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": names},
        "observation.images.wrist": {
            "dtype": "image",
            "shape": [3, HEIGHT, WIDTH],
            "names": ["channels", "height", "width"],
        },
        "observation.images.front_depth": {"dtype": "image", "shape": [HEIGHT, WIDTH, 1], "names": names},
        **{
            key: {"dtype": "int64", "shape": [1], "names": None}
            for key in ("frame_index", "episode_index", "index", "task_index")
        },
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    if geometry:
        found["observation.intrinsics.front"] = {"dtype": "float32", "shape": [3, 3], "names": None}
        found["observation.pose.front"] = {"dtype": "float32", "shape": [4, 4], "names": None}
    return found


def write_video(path: Path, frames: np.ndarray) -> None:
    """Without loss, so that frames can be compared to the last bit; a key frame only now and then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (frames.shape[2], frames.shape[1]),
        fps=FPS,
        codec="libx264rgb",
        quality=None,
        pix_fmt_out="rgb24",
        macro_block_size=1,
        output_params=["-crf", "0", "-g", "4", "-threads", "1"],
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def rows(made, geometry):
    """The rows of these (number, episode) pairs, as a table; images inside, videos outside."""
    start = {0: 0}
    for number, episode in enumerate(episodes()):
        start[number + 1] = start[number] + len(episode["action"])
    columns = {key: [] for key in features(geometry) if key != "observation.images.front"}
    for number, episode in made:
        for t in range(len(episode["action"])):
            values = {
                "observation.state": episode["state"][t].tolist(),
                "gripper": float(episode["gripper"][t, 0]),
                "action": episode["action"][t].tolist(),
                "observation.images.wrist": png(episode["wrist"][t]),
                "observation.images.front_depth": png(episode["depth"][t]),
                "frame_index": t,
                "episode_index": number,
                "index": start[number] + t,
                "task_index": number % 2,
                "timestamp": t / FPS,
                "observation.intrinsics.front": episode["intrinsics"][t].tolist(),
                "observation.pose.front": episode["pose"][t].tolist(),
            }
            for key in columns:
                columns[key].append(values[key])
    return pa.table(columns)


def write_v21(root: Path, geometry=True) -> Path:
    (root / "meta").mkdir(parents=True)
    made = episodes()
    write_info(
        root,
        "v2.1",
        geometry,
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        chunks_size=2,
    )
    lines = [
        {"episode_index": i, "tasks": [e["task"]], "length": len(e["action"])} for i, e in enumerate(made)
    ]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "meta" / "tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(TASKS))
    )
    for number, episode in enumerate(made):
        chunk = f"chunk-{number // 2:03d}"
        data = root / "data" / chunk / f"episode_{number:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows([(number, episode)], geometry), data)
        key = "observation.images.front"
        write_video(root / "videos" / chunk / key / f"episode_{number:06d}.mp4", episode["front"])
    return root


def write_v30(root: Path, geometry=True) -> Path:
    """Episodes 0 and 1 share files, episode 2 has its own."""
    (root / "meta").mkdir(parents=True)
    made, key = episodes(), "observation.images.front"
    write_info(
        root,
        "v3.0",
        geometry,
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    pq.write_table(pa.table({"task_index": [0, 1], "task": list(TASKS)}), root / "meta" / "tasks.parquet")
    entries, start = [], 0
    for file, members in enumerate(((0, 1), (2,))):
        data = root / "data" / "chunk-000" / f"file-{file:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows([(number, made[number]) for number in members], geometry), data)
        frames = np.concatenate([made[number]["front"] for number in members])
        write_video(root / "videos" / key / "chunk-000" / f"file-{file:03d}.mp4", frames)
        shown = 0
        for number in members:
            length = len(made[number]["action"])
            entries.append(
                {
                    "episode_index": number,
                    "tasks": [made[number]["task"]],
                    "length": length,
                    "data/chunk_index": 0,
                    "data/file_index": file,
                    "dataset_from_index": start,
                    "dataset_to_index": start + length,
                    f"videos/{key}/chunk_index": 0,
                    f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": shown / FPS,
                    f"videos/{key}/to_timestamp": (shown + length) / FPS,
                    "stats/action/mean": [0.0, 0.0, 0.0],
                }
            )
            shown += length
            start += length
    target = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    target.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(entries), target)
    return root


def write_info(root, version, geometry, data_path, video_path, chunks_size=1000):
    info = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "chunks_size": chunks_size,
        "data_path": data_path,
        "video_path": video_path,
        "features": features(geometry),
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))

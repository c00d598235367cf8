"""The files of a LeRobot data set (v2.0, v2.1 and v3.0): metadata, columns and frames of each episode.

Needs numpy, pyarrow, pillow and imageio-ffmpeg (whose ffmpeg also decodes AV1, LeRobot's default); no torch
and no lerobot. The layouts are in `lerobot.md` beside this file. T is the number of frames of an episode.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vilma.extras import require

__all__ = ["DamagedEpisode", "Episode", "LeRobotFiles", "decode_video"]

VERSIONS = ("v2.0", "v2.1", "v3.0")
_CHUNK = 1000


class DamagedEpisode(ValueError):
    """An episode whose rows or frames are missing or disagree."""


@dataclass(frozen=True)
class Episode:
    """One episode. ``first_frames``: for each video key, the number of its first frame within ``videos``."""

    index: int
    length: int
    task: str
    data: Path
    videos: dict[str, Path]
    first_frames: dict[str, int]


class LeRobotFiles:
    """A data set on disk.

    Attributes:
        root, version, fps, robot: of ``meta/info.json``.
        features: key -> its entry there (dtype, shape, names).
        episodes: in the order of their indices.

    Raises:
        FileNotFoundError: no data set there. ValueError: metadata that cannot be read, or another version.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        info = self._json("meta/info.json")
        self.version = str(info.get("codebase_version", ""))
        if self.version not in VERSIONS:
            raise ValueError(
                f"{self.root} is of version {self.version or 'unknown'}, wanted one of "
                f"{', '.join(VERSIONS)}; LeRobot converts older ones"
            )
        try:
            self.fps = float(info["fps"])
            self.robot = info.get("robot_type")
            self.features: dict[str, dict[str, Any]] = info["features"]
            self._data_path, self._video_path = info["data_path"], info.get("video_path")
            self._chunk = int(info.get("chunks_size", _CHUNK))
            self.episodes = list(self._episodes_v3() if self.version == "v3.0" else self._episodes_v2())
        except (KeyError, TypeError) as error:
            raise ValueError(f"the metadata in {self.root / 'meta'} cannot be used: {error!r}") from error
        if not self.episodes:
            raise ValueError(f"{self.root} holds no episode")

    def keys(self, *dtypes: str) -> list[str]:
        """The features of these dtypes ("image", "video"), or all the others when none is given."""
        pictures = ("image", "video")
        return [
            k
            for k, f in self.features.items()
            if f["dtype"] in (dtypes or ()) or (not dtypes and f["dtype"] not in pictures)
        ]

    def column(self, episode: Episode, key: str) -> np.ndarray:
        """The values of a numeric feature, (T, *shape of the feature)."""
        if key not in self.features:
            raise ValueError(f"{self.root} has no feature {key!r}; it has: {', '.join(self.features)}")
        table = self._rows(episode)
        if key not in table.column_names:
            raise DamagedEpisode(f"its rows lack {key}")
        values = table[key].combine_chunks()
        depth = 0
        while hasattr(values, "flatten") and values.type.num_fields and depth < 4:
            values, depth = values.flatten(), depth + 1
        array = values.to_numpy(zero_copy_only=False)
        shape = tuple(int(n) for n in self.features[key]["shape"])
        wanted = episode.length * int(np.prod(shape))
        if array.size != wanted:
            raise DamagedEpisode(f"{key} has {array.size} values, wanted {episode.length} x {shape}")
        return array.reshape(episode.length, *shape)

    def frames(self, episode: Episode, key: str, rows: slice | None = None) -> Iterator[np.ndarray]:
        """The pictures of an episode one by one: (H, W, 3) uint8, or (H, W) of a 16-bit picture.

        rows: only these (step 1); of a video they are sought.
        """
        kind = self.features.get(key, {}).get("dtype")
        start, stop, _ = (rows or slice(None)).indices(episode.length)
        if kind == "video":
            first = episode.first_frames[key] + start
            yield from decode_video(episode.videos[key], first, stop - start, self.fps)
        elif kind == "image":
            yield from self._pictures(episode, key, start, stop)
        else:
            found = ", ".join(self.keys("image", "video")) or "none"
            raise ValueError(f"{self.root} has no pictures {key!r}; it has: {found}")

    def _pictures(self, episode: Episode, key: str, start: int, stop: int) -> Iterator[np.ndarray]:
        from PIL import Image

        table = self._rows(episode)
        if key not in table.column_names:
            raise DamagedEpisode(f"its rows lack {key}")
        for entry in table[key].slice(start, stop - start).to_pylist():
            stored = entry.get("bytes")
            with Image.open(io.BytesIO(stored) if stored else self.root / entry["path"]) as picture:
                pixels = np.asarray(
                    picture if picture.mode.startswith(("I", "F")) else picture.convert("RGB")
                )
            yield pixels

    def _rows(self, episode: Episode) -> Any:
        """The rows of one episode as a pyarrow table, checked for their number and order."""
        if episode.length < 1:
            raise DamagedEpisode("it has no frames")
        pq = require("pyarrow.parquet", "lerobot")
        try:
            table = _read_table(str(episode.data), episode.data.stat().st_mtime_ns)
        except FileNotFoundError as error:
            raise DamagedEpisode(f"{episode.data} is missing") from error
        except (OSError, pq.lib.ArrowException) as error:
            raise DamagedEpisode(f"{episode.data} cannot be read ({error})") from error
        numbers = table["episode_index"].to_numpy()
        (own,) = np.nonzero(numbers == episode.index)
        if len(own) != episode.length or (len(own) and own[-1] - own[0] + 1 != len(own)):
            raise DamagedEpisode(
                f"{episode.data} has {len(own)} rows of it, wanted {episode.length} together"
            )
        table = table.slice(own[0], episode.length)
        if not np.array_equal(table["frame_index"].to_numpy(), np.arange(episode.length)):
            raise DamagedEpisode(f"its frames in {episode.data} are not numbered from 0 in order")
        return table

    def _episodes_v2(self) -> Iterator[Episode]:
        for entry in self._lines("meta/episodes.jsonl"):
            index = int(entry["episode_index"])
            place = {"episode_chunk": index // self._chunk, "episode_index": index}
            videos = {
                key: self.root / self._video_path.format(video_key=key, **place) for key in self.keys("video")
            }
            tasks = entry.get("tasks") or [""]
            data = self.root / self._data_path.format(**place)
            yield Episode(index, int(entry["length"]), tasks[0], data, videos, dict.fromkeys(videos, 0))

    def _episodes_v3(self) -> Iterator[Episode]:
        pq = require("pyarrow.parquet", "lerobot")
        files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.root} has no meta/episodes/*/*.parquet")
        for file in files:
            table = pq.read_table(file)
            kept = [name for name in table.column_names if not name.startswith("stats/")]
            for entry in table.select(kept).to_pylist():
                data = self._data_path.format(
                    chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"]
                )
                videos, first = {}, {}
                for key in self.keys("video"):
                    videos[key] = self.root / self._video_path.format(
                        video_key=key,
                        chunk_index=entry[f"videos/{key}/chunk_index"],
                        file_index=entry[f"videos/{key}/file_index"],
                    )
                    first[key] = round(entry[f"videos/{key}/from_timestamp"] * self.fps)
                tasks = entry.get("tasks") or [""]
                length = int(entry["length"])
                yield Episode(int(entry["episode_index"]), length, tasks[0], self.root / data, videos, first)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no LeRobot data set at {self.root}: {name} is missing; give the folder above meta/"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error})") from error

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.root} has no {name}")
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON ({error})") from error


@lru_cache(maxsize=2)
def _read_table(path: str, modified: int) -> Any:
    """A parquet file; many episodes of v3.0 share one. ``modified``: a changed file is read again."""
    return require("pyarrow.parquet", "lerobot").read_table(path)


def decode_video(path: Path, first: int, count: int, fps: float) -> Iterator[np.ndarray]:
    """Frames ``first`` to ``first + count`` of a video, (H, W, 3) uint8 each.

    Raises:
        DamagedEpisode: the file is missing, cannot be decoded, or ends before.
    """
    ffmpeg = require("imageio_ffmpeg", "lerobot")
    if not path.is_file():
        raise DamagedEpisode(f"{path} is missing")
    # Half a frame early: ffmpeg then starts with the frame meant, whatever its time was rounded to.
    seek = ["-ss", f"{(first - 0.5) / fps:.6f}"] if first else []
    reader = ffmpeg.read_frames(
        str(path),
        pix_fmt="rgb24",
        input_params=["-threads", "1", *seek],
        output_params=["-fps_mode", "passthrough", "-frames:v", str(count)],
    )
    found = 0
    try:
        width, height = next(reader)["size"]
        for content in reader:
            yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
            found += 1
            if found == count:
                break
    except (OSError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedEpisode(f"{path} cannot be decoded ({reason})") from error
    finally:
        reader.close()
    if found < count:
        raise DamagedEpisode(f"{path} ends after frame {first + found}, wanted {first + count}")

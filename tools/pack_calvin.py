"""Pack CALVIN's annotated segments into robomimic HDF5 files, once: parallel, resumable, verified."""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilma.datasets.calvin_pack import (
    MANIFEST,
    Shard,
    finish_shard,
    is_finished,
    left_out_before,
    pack_segment,
    plan_shards,
    read_manifest,
    verify_shard,
)
from vilma.datasets.calvin_tree import CAMERAS, SPLITS, CalvinTree, Segment
from vilma.datasets.robomimic_writer import finished_parts
from vilma.envs.calvin_protocol import INSTRUCTIONS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}, wanted at least 1")
    if options.segments is not None and options.segments < 1:
        raise ValueError(f"--segments is {options.segments}, wanted at least 1")
    tree = CalvinTree(options.data, options.split)
    segments = tree.segments()[: options.segments]
    shards = plan_shards(options.out, len(segments), options.segments_per_file)
    before = read_manifest(options.out)
    if before is not None and _is_whole(before, tree, shards, len(segments), options):
        print(f"{options.out} is already packed: {before['segments']} segments, {before['frames']} frames")
        return 0
    packer = Packer(tree, segments, options.cameras, options.workers, options.skip_damaged, options.compress)
    lines = packer.run(shards)
    total = {name: sum(line[name] for line in lines) for name in ("segments", "frames")}
    manifest = {
        "source": str(tree.folder.absolute()),
        "split": tree.name,
        "cameras": list(options.cameras),
        **total,
        "left_out": packer.left_out,
        "files": lines,
    }
    # Evaluation speaks in other words than the data: `vilma cache-language` embeds these too.
    (options.out / "instructions.txt").write_text("\n".join(INSTRUCTIONS.values()) + "\n")
    part = options.out / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(part, options.out / MANIFEST)
    size = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    print(
        f"{total['segments']} segments, {total['frames']} frames in {options.out}, {size / 1e9:.2f} GB "
        f"({size / max(total['frames'], 1) / 1e3:.0f} kB a frame), every array compared with its source"
    )
    for failure in packer.left_out:
        print(f"  left out: {failure}")
    return 0


def _is_whole(
    manifest: dict[str, Any],
    tree: CalvinTree,
    shards: Sequence[Shard],
    count: int,
    options: argparse.Namespace,
) -> bool:
    """Whether the manifest counts all segments and its files are there; an error when they hold others."""
    names = {line["file"] for line in manifest["files"]}
    there = [is_finished(tree, shard, options.cameras) for shard in shards if shard.path.name in names]
    is_complete = manifest["segments"] + len(manifest["left_out"]) == count and len(there) == len(names)
    return is_complete and all(there) and (options.skip_damaged or not manifest["left_out"])


class Packer:
    """Packs shards with a pool of processes; ``left_out`` says what could not be read."""

    def __init__(
        self,
        tree: CalvinTree,
        segments: Sequence[Segment],
        cameras: Sequence[str],
        workers: int,
        skip_damaged: bool = False,
        compress: bool = False,
    ):
        self.tree, self.segments, self.cameras = tree, segments, tuple(cameras)
        self.workers, self.skip_damaged, self.compress = workers, skip_damaged, compress
        self.left_out: list[str] = []

    def run(self, shards: Sequence[Shard]) -> list[dict[str, Any]]:
        """A line of the manifest for every shard, in their order.

        Raises ValueError at the end when segments could not be read; all others are packed by then.
        """
        lines: dict[Path, dict[str, Any]] = {}
        waiting: dict[Path, set[int]] = {}
        damaged: dict[Path, set[int]] = {shard.path: set() for shard in shards}
        frames = sum(len(segment) for segment in self.segments)
        # Not forked: HDF5 and threads do not survive that.
        pool = ProcessPoolExecutor(
            self.workers, mp_context=get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
        )
        with pool, _Progress(frames) as progress:
            running: dict[Future, tuple[str, Shard, int]] = {}
            todo = iter(self._todo(shards, lines, waiting, progress))
            is_drained = False
            while running or not is_drained:
                while not is_drained and len(running) < 4 * self.workers:
                    job = next(todo, None)
                    if job is None:
                        is_drained = True
                        break
                    shard, number = job
                    if number is None:
                        running[self._finish(pool, shard, damaged)] = ("finish", shard, 0)
                    else:
                        work = (shard, number, self.segments[number], self.cameras, self.compress)
                        running[pool.submit(pack_segment, self.tree, *work)] = ("pack", shard, number)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    kind, shard, number = running.pop(future)
                    if kind == "finish":
                        lines[shard.path] = future.result()
                        continue
                    try:
                        future.result()
                    except (ValueError, FileNotFoundError) as error:
                        self.left_out.append(f"segment {number}: {error}")
                        damaged[shard.path].add(number)
                    progress.advance(len(self.segments[number]))
                    waiting[shard.path].discard(number)
                    usable = len(damaged[shard.path]) < len(shard.segments)
                    if not waiting[shard.path] and usable and (self.skip_damaged or not damaged[shard.path]):
                        running[self._finish(pool, shard, damaged)] = ("finish", shard, 0)
        if self.left_out and not self.skip_damaged:
            told = "\n  ".join(self.left_out[:10])
            raise ValueError(
                f"{len(self.left_out)} segments cannot be read (all others are packed):\n  {told}\nRepair "
                "these files and run the same command again, or leave them out with --skip-damaged"
            )
        return [lines[shard.path] for shard in shards if shard.path in lines]

    def _todo(self, shards, lines, waiting, progress):
        """(shard, segment) of what is missing; (shard, None) for one whose parts are all there."""
        for shard in shards:
            if is_finished(self.tree, shard, self.cameras):
                segments, frames = verify_shard(shard)
                lines[shard.path] = {"file": shard.path.name, "segments": segments, "frames": frames}
                self.left_out += [
                    f"segment {number}: left out of {shard.path} before; remove that file to pack it again"
                    for number in left_out_before(shard)
                ]
                progress.skip(sum(len(self.segments[number]) for number in shard.segments))
                continue
            there = finished_parts(shard.path, shard.request(self.tree, self.cameras))
            progress.skip(sum(len(self.segments[number]) for number in there))
            waiting[shard.path] = set(shard.segments) - there
            if not waiting[shard.path]:
                yield shard, None
            for number in sorted(waiting[shard.path]):
                yield shard, number

    def _finish(self, pool: ProcessPoolExecutor, shard: Shard, damaged: dict[Path, set[int]]) -> Future:
        return pool.submit(finish_shard, self.tree, shard, self.cameras, frozenset(damaged[shard.path]))


def _end_with(parent: int) -> None:
    """End this process when its parent is killed; else it would wait for work for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


class _Progress:
    """A bar on a terminal, else a line now and then. Frames that were there before do not count for speed."""

    def __init__(self, total: int, interval_s: float = 15.0):
        self.total, self.interval_s = total, interval_s
        self.done = self.skipped = 0
        self._began = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("pack"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("frames"),
                TimeRemainingColumn(),
            )
            self._bar.start()
            self._row = self._bar.add_task("pack", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, frames: int) -> None:
        self.skipped += frames
        self._show()

    def advance(self, frames: int) -> None:
        self.done += frames
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._row, completed=self.done + self.skipped)
        elif self.done and time.monotonic() - self._printed > self.interval_s:
            self._printed = time.monotonic()
            speed = self.done / (self._printed - self._began)
            left = (self.total - self.done - self.skipped) / speed
            print(
                f"packed {self.done + self.skipped}/{self.total} frames, {speed:.0f} a second, about "
                f"{left:.0f} s left",
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma pack-calvin",
        description=__doc__,
        epilog="Run the same command again after an interruption: what is packed stays. Then train with "
        "--data.path OUT.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a CALVIN data set, e.g. task_ABC_D")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the packed files")
    parser.add_argument("--split", choices=SPLITS, default="training")
    parser.add_argument("--cameras", nargs="+", choices=sorted(CAMERAS), default=list(CAMERAS))
    parser.add_argument("--segments", type=int, metavar="N", help="only the first N segments")
    parser.add_argument("--segments-per-file", type=int, default=512, metavar="N")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--compress", action="store_true", help="half the bytes, a frame is read at a tenth of the speed"
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave out segments that cannot be read")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

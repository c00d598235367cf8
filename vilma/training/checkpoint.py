"""Checkpoints that are whole or absent: written aside, synced, renamed, linked; damage is found by digest.

``checkpoints/step-00000500/`` holds what the caller wrote (model.safetensors, config.yaml, stats.json,
trainer.pt) and ``SHA256SUMS`` (``sha256sum -c`` reads it); ``checkpoints/last`` and ``checkpoints/best`` link
to such folders.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

__all__ = ["CheckpointError", "Checkpoints", "load_weights", "replace_text", "save_weights"]

_SUMS = "SHA256SUMS"
_ASIDE = ".tmp-"


class CheckpointError(OSError):
    """A checkpoint could not be written or read: says which, why and what is safe."""


class Checkpoints:
    """The folder ``checkpoints/`` of a run. One process writes it at a time.

    Args:
        folder: made when the first checkpoint is written.
        keep: newest checkpoints to keep, besides the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}, wanted at least 1 checkpoint")
        self.folder, self.keep = Path(folder), keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first; their content is not checked."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d{8,})", p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in found if m)

    def linked(self, name: str) -> int | None:
        """The step that the link ``name`` leads to; none where it leads nowhere."""
        link = self.folder / name
        match = re.fullmatch(r"step-(\d{8,})", os.readlink(link)) if link.is_symlink() else None
        return int(match.group(1)) if match and link.is_dir() else None

    def clean(self) -> list[str]:
        """Remove what a killed process left half-written; returns the names."""
        left = sorted(self.folder.glob(f"{_ASIDE}*")) if self.folder.is_dir() else []
        for path in left:
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        return [path.name for path in left]

    def save(self, step: int, write: Callable[[Path], None], best: bool = False) -> Path:
        """Write one checkpoint, point ``last`` (and ``best``) to it and remove the oldest ones.

        Args:
            write: fills an empty folder.

        Raises:
            CheckpointError: it could not be written (a full disk); what was there is untouched.
        """
        target = self.path(step)
        aside = self.folder / f"{_ASIDE}{target.name}"
        with self._failure_named(step):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.clean()
                aside.mkdir()
                write(aside)
                sums = [f"{_digest(file)}  {file.relative_to(aside)}\n" for file in _files(aside)]
                (aside / _SUMS).write_text("".join(sums))
                for file in _files(aside):
                    file.chmod(aside.stat().st_mode & 0o666)  # safetensors writes for the owner alone
                for path in (*_files(aside), *(p for p in aside.rglob("*") if p.is_dir()), aside):
                    _sync(path)
                if target.is_dir():
                    self._remove(target)
                os.rename(aside, target)
                _sync(self.folder)
                self.link("last", step)
                if best:
                    self.link("best", step)
                self.prune()
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        return target

    def newest(self, read: Callable[[Path], T]) -> tuple[Path, T, list[str]] | None:
        """The newest whole checkpoint: its folder, what ``read`` made of it, and the damage met before.

        Damaged newer ones are renamed to ``<name>.damaged`` and described. None where there is none at all.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used.
        """
        damage = []
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                self.verify(folder)
                found = read(folder)
            except CheckpointError as error:
                damage.append(str(error))
                continue
            if damage:
                for damaged in [s for s in self.steps() if s > step]:
                    self._set_aside(self.path(damaged))
            self.link("last", step)
            return folder, found, damage
        if damage:
            raise CheckpointError(
                "no checkpoint of this run can be used:\n  "
                + "\n  ".join(damage)
                + f"\nRestore one from a copy, or remove {self.folder} to start again"
            )
        return None

    @staticmethod
    def verify(folder: Path) -> None:
        """Raise CheckpointError unless every file of a checkpoint has the digest it was written with."""
        try:
            lines = (folder / _SUMS).read_text().splitlines()
            for line in lines:
                digest, name = line.split("  ", 1)
                if not (folder / name).is_file():
                    raise CheckpointError(f"{folder} is damaged: {name} is missing")
                if _digest(folder / name) != digest:
                    raise CheckpointError(f"{folder} is damaged: {name} is not what was written")
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error

    def link(self, name: str, step: int) -> None:
        """Point the link ``name`` to the checkpoint of ``step``, atomically."""
        if self.linked(name) == step:
            return
        aside = self.folder / f"{_ASIDE}{name}"
        aside.unlink(missing_ok=True)
        os.symlink(self.path(step).name, aside)
        os.replace(aside, self.folder / name)
        _sync(self.folder)

    def prune(self) -> None:
        """Remove all but the newest ``keep`` and the best."""
        for step in self.steps()[: -self.keep]:
            if step != self.linked("best"):
                self._remove(self.path(step))

    def _remove(self, folder: Path) -> None:
        aside = self.folder / f"{_ASIDE}removed-{folder.name}"
        os.rename(folder, aside)  # at once: a kill must not leave half a checkpoint under a good name
        shutil.rmtree(aside)

    def _set_aside(self, folder: Path) -> None:
        damaged = folder.with_name(f"{folder.name}.damaged")
        if damaged.is_dir():
            shutil.rmtree(damaged)
        os.rename(folder, damaged)

    @contextmanager
    def _failure_named(self, step: int) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            place = self.folder if self.folder.is_dir() else self.folder.parent
            free = shutil.disk_usage(place).free if place.is_dir() else None
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            full = full or (free is not None and free < 1 << 20)
            steps = self.steps()
            safe = f"The last good one is {self.path(steps[-1])}" if steps else "There is none before it"
            room = "" if free is None else f" ({free / 2**20:,.0f} MiB free)"
            advice = "Free some space" if full else "See to the cause"
            raise CheckpointError(
                f"could not write the checkpoint of step {step} in {self.folder}: "
                f"{'the disk is full' if full else 'writing failed'}{room}: {error}. {safe}. "
                f"{advice} and run the same command again: it goes on from there"
            ) from error


def load_weights(module: nn.Module, values: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Load the values of a checkpoint ``folder``; ValueError if they belong to another architecture."""
    try:
        module.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(f"{folder} is a checkpoint of another architecture: {error}") from error


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model by its own ``save_pretrained``, else as ``model.safetensors`` alone."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file; it holds the old or the new text at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{_ASIDE}{path.name}")
    with open(aside, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
    _sync(path.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

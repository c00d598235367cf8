"""Reproduce a published table: collect, train and evaluate cell by cell, over as many sittings as it takes.

``robosuite-table``: success of PointMapPolicy in robosuite by modality, every cell with the same budget. Each
finished cell is a small JSON file below --out, which is never made again; an interrupted one goes on where it
was. Cells are separate processes of the ordinary commands, with one thread each.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vilma import config
from vilma.evaluation import read_result
from vilma.report import read_timings
from vilma.tools._robosuite_show import show
from vilma.tools._robosuite_table import CELLS, FIRST_SEED, Cell, Plan

__all__ = ["code_commit", "main"]

OUT, WORK = Path("docs/results/pointmap/table"), Path("runs/table")
TRIAL = {"demos": 3, "steps": 12, "episodes": 2}
PATIENCE = 60.0  # seconds for a command to write a checkpoint and end


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}, wanted at least 1")
    if options.trial and OUT in (options.out, options.work):
        raise ValueError("--trial makes figures that mean nothing: give it an --out of its own")
    if options.show:
        print(show(read_cells(options.out)), end="")
        return 0
    plans = choose(options)
    if options.list:
        for plan in plans:
            print(f"{plan.cell.name:<36} {state(plan, options.out)}")
        return 0
    return Table(plans, options.out, options.jobs).make()


def choose(options: argparse.Namespace) -> list[Plan]:
    """The plans of the cells that are asked for, in the table's order."""
    patterns = options.only
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in CELLS):
            raise ValueError(f"no cell matches {pattern!r}; cells: {', '.join(cell.name for cell in CELLS)}")
    trial = TRIAL if options.trial else {}
    return [
        Plan(cell, options.work, **trial)
        for cell in CELLS
        if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)
        or (not patterns and (options.list or not cell.is_optional))
    ]


def state(plan: Plan, out: Path) -> str:
    """One line on how far a cell is."""
    optional = " (optional)" if plan.cell.is_optional else ""
    made = read_cell(out / f"{plan.cell.name}.json")
    if made is not None:
        stale = "" if made["recipe"] == plan.recipe() else "; of ANOTHER RECIPE, remove it to make it anew"
        return f"{made['successes']}/{made['episodes']}{stale}"
    if (plan.run / "checkpoints" / "last").exists():
        return "begun" + optional
    return "missing" + optional


def read_cell(path: Path) -> dict[str, Any] | None:
    """The figures of a finished cell, or None."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not a cell of the table ({error}); remove it") from error


def read_cells(out: Path) -> dict[str, dict[str, Any]]:
    """The figures of all finished cells, by name."""
    made = {cell.name: read_cell(out / f"{cell.name}.json") for cell in CELLS}
    return {name: figures for name, figures in made.items() if figures is not None}


class Table:
    """Makes what is missing, ``jobs`` cells at a time."""

    def __init__(self, plans: Sequence[Plan], out: Path, jobs: int):
        self.plans, self.out, self.jobs = plans, out, jobs
        self.failed: list[str] = []
        self._children: set[subprocess.Popen] = set()
        self._stopping = threading.Event()
        self._speaking = threading.Lock()

    def make(self) -> int:
        """The exit status: 0 if every cell is there."""
        waiting: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        for plan in self.plans:
            made = read_cell(self.out / f"{plan.cell.name}.json")
            if made is None:
                waiting.put(plan)
            elif made["recipe"] != plan.recipe():
                self.failed.append(plan.cell.name)
                self._say(
                    plan.cell, f"its file in {self.out} is of another recipe; remove it to make it anew"
                )
        count = waiting.qsize()
        self._say(None, f"{len(self.plans) - count} of {len(self.plans)} cells are there, {count} to make")
        crew = [threading.Thread(target=self._work, args=(waiting,), daemon=True) for _ in range(self.jobs)]
        with _terminable():
            try:
                for thread in crew:
                    thread.start()
                for thread in crew:
                    while thread.is_alive():
                        thread.join(0.2)
            except BaseException as reason:
                self._stop(isinstance(reason, _Terminated))
                raise
        if self.failed:
            self._say(None, f"not made: {', '.join(self.failed)}")
        return 1 if self.failed else 0

    def _work(self, waiting: "queue.SimpleQueue[Plan]") -> None:
        while not self._stopping.is_set():
            try:
                plan = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            try:
                with _held(plan.work / "locks" / f"cell_{plan.cell.name}", wait=False) as is_ours:
                    if not is_ours:
                        self._say(plan.cell, "is being made by another process")
                        continue
                    figures = self._make_cell(plan)
            except _Failed as reason:
                if not self._stopping.is_set():
                    self.failed.append(plan.cell.name)
                    self._say(plan.cell, f"failed: {reason}")
                continue
            low, high = figures["wilson95"]
            self._say(
                plan.cell,
                f"{figures['successes']}/{figures['episodes']} ({low:.0%} to {high:.0%}), "
                f"{time.monotonic() - began:.0f} s",
            )

    def _make_cell(self, plan: Plan) -> dict[str, Any]:
        commands = {"collect": plan.collect(self.jobs), "train": plan.train(), "evaluate": plan.evaluate()}
        with _held(plan.work / "locks" / f"data_{plan.data.stem}"):
            if not plan.data.exists():
                self._call(plan, "collect", commands["collect"])
        with _held(plan.work / "locks" / f"run_{plan.run.name}"):
            self._call(plan, "train", commands["train"])
        self._call(plan, "evaluate", commands["evaluate"])
        shown = {phase: shlex.join(["vilma", *words]) for phase, words in commands.items()}
        figures = cell_figures(plan, shown)
        write_whole(self.out / f"{plan.cell.name}.json", json.dumps(figures, indent=1) + "\n")
        return figures

    def _call(self, plan: Plan, phase: str, words: Sequence[str]) -> None:
        log = plan.work / "logs" / f"{plan.cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._say(plan.cell, f"{phase} ({log})")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        with log.open("a") as file:
            file.write(f"$ {shlex.join(['vilma', *words])}\n")
            file.flush()
            if self._stopping.is_set():
                raise _Failed("stopped")
            child = subprocess.Popen(
                [sys.executable, "-m", "vilma.cli", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            lines = log.read_text(errors="replace").splitlines()
            raise _Failed(
                f"vilma {words[0]} ended with {code}: {lines[-1] if lines else 'no output'} ({log})"
            )

    def _stop(self, tell_children: bool) -> None:
        """Let the commands write their checkpoints. Ctrl-C reached them by itself."""
        self._stopping.set()
        children = list(self._children)
        for child in children:
            if tell_children:
                child.terminate()
        until = time.monotonic() + PATIENCE
        for child in children:
            try:
                child.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()

    def _say(self, cell: Cell | None, text: str) -> None:
        with self._speaking:
            print(f"{time.strftime('%H:%M:%S')} {f'{cell.name}: ' if cell else ''}{text}", flush=True)


class _Failed(RuntimeError):
    """A command of a cell did not do its work."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the main thread as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_it(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _held(name: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among threads and processes; with ``wait`` false, yields whether it was free."""
    name.parent.mkdir(parents=True, exist_ok=True)
    with name.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def cell_figures(plan: Plan, commands: Mapping[str, str]) -> dict[str, Any]:
    """What is kept of a finished cell."""
    cell, result = plan.cell, read_result(plan.result)
    summary, episodes = result["summary"], sorted(result["episodes"], key=lambda e: e["index"])
    recipe = config.read(plan.run / "config.yaml")
    timings = read_timings(plan.run).get("train", {})
    return {
        "cell": cell.name,
        "setting": cell.setting.name,
        "task": f"robosuite/{cell.setting.task}",
        "modality": cell.modality,
        "variant": cell.variant,
        "moved": cell.moved,
        "seed": cell.seed,
        "environment": {**cell.setting.environment, **cell.environment},
        "successes": summary["successes"],
        "episodes": summary["episodes"],
        "wilson95": [round(limit, 4) for limit in summary["wilson95"]],
        "first_seed": FIRST_SEED,
        "outcomes": "".join("1" if episode["success"] else "0" for episode in episodes),
        "mean_steps_success": summary["mean_steps_success"],
        "lost": summary["lost"],
        "demos": plan.demos or cell.setting.demos,
        "steps": recipe["train"]["steps"],
        "batch_size": recipe["train"]["batch_size"],
        "parameters": count_parameters(plan.run / "checkpoints" / "last"),
        "train_seconds": timings.get("seconds"),
        "evaluate_seconds": summary["seconds"],
        "recipe": plan.recipe(),
        "commit": code_commit(),
        "trained_at": timings.get("commit"),
        "checkpoint": result["description"]["policy"]["checkpoint"],
        "versions": result["description"]["versions"],
        "command": f"vilma reproduce robosuite-table --only {cell.name}",
        "commands": dict(commands),
    }


def count_parameters(checkpoint: Path) -> int:
    """Trained parameters of a policy."""
    from vilma.policies import load_policy

    policy = load_policy(checkpoint, "cpu")
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def code_commit() -> str:
    """The commit of the checkout, " with changes" behind it if anything but the pages in docs/ differs.

    (The table's own files lie there: they would make every cell but the first look changed.)
    """
    if named := os.environ.get("VILMA_COMMIT"):
        return named
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        found = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=20
        )
        return found.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "not a checkout"
        changed = git("status", "--porcelain", "--", ".", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", choices=["robosuite-table"])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="cells whose names match, e.g. 'lift_*_seed0'; default: all but the optional ones",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and how far they are")
    parser.add_argument(
        "--show", action="store_true", help="print the finished cells as Markdown, with tests"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time, a core each")
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help=f"finished cells (default: {OUT})"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help=f"demonstrations and runs (default: {WORK})"
    )
    parser.add_argument(
        "--trial", action="store_true", help="a few demonstrations, updates and episodes: does it all work?"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

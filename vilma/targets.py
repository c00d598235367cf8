"""What was measured beside what was asked for: the lines that every ``vilma show-<topic>`` prints."""

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Group", "Line", "show"]

ROOT = Path(__file__).resolve().parent.parent


class Line(NamedTuple):
    """One line that a topic must show."""

    name: str
    figure: str
    target: str
    met: bool


class Group(NamedTuple):
    """Tests that show a line, and what they show.

    Args:
        arguments: what pytest is given: files, node ids, ``-k`` and ``-m`` with their values.
    """

    name: str
    arguments: tuple[str, ...]

    def line(self) -> Line:
        """Run them in a process of their own. Met when all pass; a skipped one shows nothing."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--durations=0", *self.arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr[-200:]
        if result.returncode < 0:
            last = f"ended by signal {-result.returncode} after: {last}"
        took = time.perf_counter() - began
        met = result.returncode == 0 and " skipped" not in last
        return Line(self.name, f"{last.strip('= ')} [{took:.0f} s]", "all pass, none skipped", met)


def show(lines: Iterable[Line]) -> int:
    """Print each line as it comes; returns the exit status: 0 when all are met."""
    all_met = True
    for name, figure, target, met in lines:
        print(f"{'met   ' if met else 'MISSED'}  {name}: {figure}   (target: {target})", flush=True)
        all_met = all_met and met
    return 0 if all_met else 1

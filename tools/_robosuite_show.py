"""The robosuite table as Markdown, from the files of its finished cells."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vilma.evaluation import wilson_interval
from vilma.tools._robosuite_table import CELLS, SHIFT, SHIFTS, Setting

__all__ = ["camera_shift", "compare", "mcnemar", "pooled", "show"]

SIGNIFICANT = 0.05
Figures = Mapping[str, Mapping[str, Any]]


def show(made: Figures) -> str:
    """Markdown of the whole table. made: the content of the cells' files, by cell name."""
    settings = list(dict.fromkeys(cell.setting for cell in CELLS))
    parts = [
        _camera_table(setting, made) if setting in SHIFTS else _modality_table(setting, made)
        for setting in settings
    ]
    return "\n\n".join(parts) + "\n"


def mcnemar(first: str, second: str) -> tuple[int, int, float]:
    """Episodes that only the first won, that only the second won, and the exact two-sided p-value.

    The outcomes ("1" or "0" an episode) are of the same episodes: under the null each discordant pair falls
    to either side with probability 1/2 (Q. McNemar 1947; the exact form is the sign test).
    """
    if len(first) != len(second):
        raise ValueError(f"outcomes of {len(first)} and of {len(second)} episodes are not paired")
    ours = sum(a > b for a, b in zip(first, second))
    theirs = sum(a < b for a, b in zip(first, second))
    count = ours + theirs
    tail = sum(math.comb(count, k) for k in range(min(ours, theirs) + 1)) / 2**count
    return ours, theirs, min(1.0, 2 * tail)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (S. Holm 1979), in the given order."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def pooled(cells: Sequence[Mapping[str, Any]]) -> str:
    """``58/100 (48 to 67 %)``: the cells' episodes together, with Wilson's 95 % interval."""
    wins, episodes = (sum(cell[key] for cell in cells) for key in ("successes", "episodes"))
    low, high = wilson_interval(wins, episodes)
    return f"{wins}/{episodes} ({100 * low:.0f} to {100 * high:.0f} %)"


def compare(setting: Setting, made: Figures) -> list[tuple[str, str, int, int, float, float]]:
    """Pairs of rows (modality and training) on the same episodes, the training seeds that both have pooled.

    Each is (first, second, episodes that only the first won, only the second, p, p adjusted by Holm for the
    pairs of this setting), the better one first.
    """
    rows = _by_row(setting, made)
    pairs = []
    for one, other in itertools.combinations(rows, 2):
        common = sorted(set(rows[one]) & set(rows[other]))
        if not common:
            continue
        outcomes = ["".join(rows[name][seed]["outcomes"] for seed in common) for name in (one, other)]
        if outcomes[1].count("1") > outcomes[0].count("1"):
            (one, other), outcomes = (other, one), outcomes[::-1]
        pairs.append((one, other, *mcnemar(*outcomes)))
    adjusted = holm([pair[4] for pair in pairs])
    return [(*pair, value) for pair, value in zip(pairs, adjusted)]


def camera_shift(made: Figures, centimetres: int, setting: Setting = SHIFT) -> dict[str, dict[str, float]]:
    """Modality -> {"" or "reposed": successes lost by the shift, of a hundred episodes}, where run."""
    lost: dict[str, dict[str, float]] = {}
    for cell in CELLS:
        still, moved = made.get(cell.name), made.get(f"{cell.name}_{centimetres}cm")
        if cell.setting is setting and not cell.moved and still and moved:
            rates = [figures["successes"] / figures["episodes"] for figures in (still, moved)]
            lost.setdefault(cell.modality, {})[cell.variant] = 100 * (rates[0] - rates[1])
    return lost


def _by_row(setting: Setting, made: Figures) -> dict[str, dict[int, Mapping[str, Any]]]:
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in CELLS:
        if cell.setting is setting and cell.name in made:
            rows.setdefault(cell.row, {})[cell.seed] = made[cell.name]
    return rows


def _head(setting: Setting, made: Figures) -> str:
    cells = [made[cell.name] for cell in CELLS if cell.setting is setting and cell.name in made]
    if not cells:
        return f"**{setting.title}**: not run"
    steps = " or ".join(str(n) for n in sorted({cell["steps"] for cell in cells}))
    demos = " or ".join(str(n) for n in sorted({cell["demos"] for cell in cells}))
    return f"**{setting.title}**: {demos} demonstrations, {steps} updates of {cells[0]['batch_size']} samples"


def _modality_table(setting: Setting, made: Figures) -> str:
    cells = [cell for cell in CELLS if cell.setting is setting]
    head = _head(setting, made)
    if not any(cell.name in made for cell in cells):
        return head
    seeds = sorted({cell.seed for cell in cells})
    columns = ["modality", *(f"seed {seed}" for seed in seeds), *(["together"] if len(seeds) > 1 else [])]
    lines = [columns, ["---"] * len(columns)]
    for name in dict.fromkeys(cell.row for cell in cells):
        row = {cell.seed: made.get(cell.name) for cell in cells if cell.row == name}
        there = [figures for figures in row.values() if figures]
        together = [pooled(there) if len(there) == len(seeds) else "not run"] if len(seeds) > 1 else []
        lines.append([name, *(pooled([row[s]]) if row.get(s) else "not run" for s in seeds), *together])
    text = f"{head}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + _differences(compare(setting, made))


def _differences(pairs: Sequence[tuple[str, str, int, int, float, float]]) -> str:
    """A line for every row that is better than others, the most wins first."""
    if not pairs:
        return ""
    beaten: dict[str, list[str]] = {}
    for one, other, ours, theirs, _, value in pairs:
        if value < SIGNIFICANT:
            beaten.setdefault(one, []).append(f"{other} {ours}:{theirs}")
    found = sum(map(len, beaten.values()))
    count = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}"
    head = (
        f"\n\nSignificant: {found} of {count} (exact McNemar test on the same episodes, Holm's correction, "
        f"p < {SIGNIFICANT}){':' if found else '.'}"
    )
    if not found:
        return head
    lines = [f"- {one} over {', '.join(others)}" for one, others in beaten.items()]
    return f"{head}\n\n" + "\n".join(sorted(lines, key=lambda line: -line.count(":")))


def _camera_table(setting: Setting, made: Figures) -> str:
    head = _head(setting, made)
    trainings = [cell for cell in CELLS if cell.setting is setting and not cell.moved]
    if not any(cell.name in made for cell in CELLS if cell.setting is setting):
        return head
    columns = ["modality", "trained", "0 cm", "5 cm", "10 cm", "lost at 5 cm", "lost at 10 cm"]
    lines = [columns, ["---"] * len(columns)]
    lost = {centimetres: camera_shift(made, centimetres, setting) for centimetres in (5, 10)}
    for cell in sorted(trainings, key=lambda cell: (cell.modality, cell.variant)):
        found = [made.get(f"{cell.name}{suffix}") for suffix in ("", "_5cm", "_10cm")]
        values = [lost[n].get(cell.modality, {}).get(cell.variant) for n in (5, 10)]
        lines.append(
            [
                cell.modality,
                "views re-posed" if cell.variant else "plainly",
                *(pooled([figures]) if figures else "not run" for figures in found),
                *("" if value is None else f"{value:.0f} of 100" for value in values),
            ]
        )
    text = f"{head}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + "".join(f"\n\n{line}" for line in _claims(setting, lost[5], made))


def _claims(setting: Setting, lost: Mapping[str, Mapping[str, float]], made: Figures) -> list[str]:
    """Whether re-posing halves what a shift of 5 cm costs, for each modality that has both."""
    lines = []
    for modality, values in lost.items():
        if len(values) == 2:
            plain, reposed = values[""], values["reposed"]
            if plain <= 0:
                said = "nothing was lost without it, so there is nothing to halve"
            else:
                said = "at most half: met" if reposed <= plain / 2 else "at most half: missed"
            names = [f"{setting.name}_{modality}{variant}_seed0_5cm" for variant in ("-reposed", "")]
            wins = [f"{made[name]['successes']}/{made[name]['episodes']}" for name in names]
            value = mcnemar(*(made[name]["outcomes"] for name in names))[2]
            lines.append(
                f"{modality}: with re-posed views in training, {reposed:.0f} instead of {plain:.0f} of 100 "
                f"episodes are lost at 5 cm ({said}); there it wins {wins[0]} instead of {wins[1]} "
                f"(exact McNemar p {_p(value)})."
            )
    return lines


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"

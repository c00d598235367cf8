"""Tables of a run's page beyond single rollouts: success by task and group, and chains of instructions."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .summaries import table

__all__ = ["by_task", "chain_hero", "chains"]


def by_task(results: Sequence[Mapping[str, Any]]) -> str:
    """HTML of success by task, group and over all, with the deviation over repeats.

    Blanked policies are left to the table of all evaluations, and so is a single task without repeats: then
    it is empty.
    """
    seeing = [r for r in results if not r["description"].get("blank") and r["episodes"]]
    rows = table(seeing)
    names = {r["description"].get("environment", {}).get("name") for r in seeing}
    if len(names) < 2 and all(row.deviation is None for row in rows):
        return ""
    cells = ["<tr><th>Task</th><th>Success</th><th>Over repeats</th><th>Episodes</th></tr>"]
    for row in rows:
        name = escape(row.name) if row.kind == "task" else f"<strong>{escape(row.name)}</strong>"
        deviation = "" if row.deviation is None else f"± {100 * row.deviation:.1f}"
        cells.append(
            f"<tr><td>{name}</td><td>{100 * row.mean:.1f}&thinsp;%</td><td>{deviation}</td>"
            f"<td>{row.episodes}</td></tr>"
        )
    note = "Each task counts the same in a mean; the deviation is over repeats from other first seeds."
    return f'<div class="wide"><table>{"".join(cells)}</table></div><p class="note">{note}</p>'


def chains(results: Mapping[str, Mapping[str, Any]]) -> str:
    """HTML of evaluations in chains: the share of chains that reach 1, 2, ... tasks, and the mean length."""
    longest = max((len(r["summary"]["success"]) for r in results.values()), default=0)
    heads = "".join(f"<th>{n} in a row</th>" for n in range(1, longest + 1))
    rows = [f"<tr><th>Evaluation</th><th>Chains</th>{heads}<th>Mean length</th></tr>"]
    for name, result in results.items():
        summary = result["summary"]
        reached = "".join(f"<td>{_rate(s)}</td>" for s in summary["success"])
        reached += "<td></td>" * (longest - len(summary["success"]))
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{summary['chains']} of {result['planned']}</td>{reached}"
            f"<td>{_length(summary)}</td></tr>"
        )
    note = "Intervals (95&thinsp;%) are bootstraps over chains."
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="note">{note}</p>'


def chain_hero(name: str, result: Mapping[str, Any]) -> str:
    """HTML of the first thing on the page of a run that was evaluated in chains alone."""
    summary = result["summary"]
    length = summary["mean_length"]
    value = "–" if length is None else f"{length['value']:.2f}"
    return (
        f'<div class="card big"><div class="figure">{value}</div>'
        f"<p>tasks in a row, mean of {summary['chains']} chains ({escape(name)})</p>"
        f'<p class="note">95&thinsp;% bootstrap interval {_length(summary)}</p></div>'
    )


def _rate(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _length(summary: Mapping[str, Any]) -> str:
    if summary["mean_length"] is None:
        return "–"
    low, high = summary["mean_length"]["interval"]
    return f"{summary['mean_length']['value']:.2f} [{low:.2f}, {high:.2f}]"

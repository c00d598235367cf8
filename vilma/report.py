"""One run as one page: a self-contained HTML file with result, uncertainty, curves, pictures and films.

It reads what a run directory holds (``eval/*.json``, ``metrics.jsonl``, ``pictures/*.png``, ``timings.json``,
``config.yaml``, ``checkpoints/last``); what is missing is said, not an error. Nothing is loaded from
elsewhere: styles, drawings, pictures and films are inside the file.
"""

import base64
import json
import math
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import report_tables

__all__ = ["read_timings", "record_time", "source_commit", "write_page", "write_report"]

MAX_FILM_BYTES = 40_000_000
CURVES = (("loss", "Loss"), ("lr", "Learning rate"), ("grad_norm", "Gradient norm"))


def record_time(run_dir: str | Path, phase: str, seconds: float, command: str | None = None) -> None:
    """Add seconds to a phase in ``timings.json``; a phase that is recorded again adds up.

    Kept beside them: when the phase ended and the commit that ran it. Time lost to a SIGKILL is in neither.

    Args:
        phase: for example "collect", "train" or "evaluate robosuite_Lift"; pages list them in this order.
        command: the command line that ran it.
    """
    run_dir = Path(run_dir)
    timings = read_timings(run_dir)
    entry = timings.setdefault(phase, {"seconds": 0.0, "runs": 0})
    entry["seconds"] = round(entry["seconds"] + seconds, 3)
    entry["runs"] += 1
    entry["ended"] = round(time.time(), 1)
    entry["commit"] = source_commit()
    if command:
        entry["command"] = command
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_whole(run_dir / "timings.json", json.dumps(timings, indent=1) + "\n")


def source_commit() -> str:
    """The commit of the running checkout, " with changes" behind it if it has any; else what is known.

    The environment variable ``VILMA_COMMIT`` names it where the files were copied without their history.
    """
    if named := os.environ.get("VILMA_COMMIT"):
        return named
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "not a checkout"
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def read_timings(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Phase -> seconds, runs and command; empty when nothing was recorded."""
    try:
        timings = json.loads((Path(run_dir) / "timings.json").read_text())
        return {str(k): {"runs": 1, **v, "seconds": float(v["seconds"])} for k, v in timings.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_report(
    run_dir: str | Path, facts: Iterable[tuple[str, str]] = (), headline: str | None = None
) -> Path:
    """Write ``RUN/report.html`` and return its path.

    Args:
        facts: (name, value) lines for the table of facts: versions, commit, the data set's size.
        headline: name of the evaluation at the top (``eval/<name>.json``); by default the one with the most
            episodes among those whose policy saw everything.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory {run_dir}")
    results, chained, unreadable = _read_results(run_dir / "eval")
    best, blanked = _headline(results, headline)
    grouped = report_tables.by_task(list(results.values()))
    hero = _hero(best, blanked)
    if best is None and chained:
        hero = f'<section class="hero">{report_tables.chain_hero(*next(iter(chained.items())))}</section>'
    sections = [
        hero,
        *([_section("Chains of instructions", report_tables.chains(chained))] if chained else []),
        *([_section("By task and group", grouped)] if grouped else []),
        _section("Rollouts", _films(run_dir / "eval", best, blanked)),
        _section("What the policy sees", _pictures(run_dir / "pictures")),
        _section("Training", _curves(run_dir / "metrics.jsonl")),
        _section("All evaluations", _table(results, unreadable)),
        _section("Time", _phases(read_timings(run_dir))),
        _section("Facts", _facts(run_dir, facts) + _config(run_dir / "config.yaml")),
    ]
    first = best or next(iter(chained.values()), None)
    environment = first["description"].get("environment", {}) if first else {}
    task = environment.get("name", "") if isinstance(environment, Mapping) else ""
    return _write_page(run_dir, str(task), sections)


def write_page(
    run_dir: str | Path,
    subtitle: str,
    hero: str,
    sections: Iterable[tuple[str, str]],
    curves: Sequence[tuple[str, str]] = CURVES,
    facts: Iterable[tuple[str, str]] = (),
) -> Path:
    """Write ``RUN/report.html`` of a run whose result is no rollout, and return its path.

    Args:
        hero: HTML of what stands first.
        sections: (title, HTML) between the result and the curves, times and facts of the run.
        curves: (key in metrics.jsonl, title) of the curves.
        facts: (name, value) lines for the table of facts.
    """
    run_dir = Path(run_dir)
    parts = [
        f'<section class="hero">{hero}</section>',
        *(_section(title, content) for title, content in sections),
        _section("Training", _curves(run_dir / "metrics.jsonl", curves)),
        _section("Time", _phases(read_timings(run_dir))),
        _section("Facts", _facts(run_dir, facts) + _config(run_dir / "config.yaml")),
    ]
    return _write_page(run_dir, subtitle, parts)


def _write_page(run_dir: Path, subtitle: str, sections: Sequence[str]) -> Path:
    page = PAGE.format(
        title=escape(run_dir.absolute().name),
        style=STYLE,
        task=escape(subtitle),
        date=time.strftime("%Y-%m-%d %H:%M"),
        body="\n".join(sections),
    )
    path = run_dir / "report.html"
    _write_whole(path, page)
    return path


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_results(
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], list[str]]:
    """Results of single rollouts, results in chains, and the names of files that are neither."""
    results, chained, unreadable = {}, {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            # A file that cannot be drawn alone is named; it must not cost the rest of the page.
            if "chains" in result and "episodes" not in result:
                report_tables.chains({path.stem: result})
                chained[path.stem] = result
                continue
            _table({path.stem: result}, [])
            report_tables.by_task([result])
            _hero(result, None)
            results[path.stem] = result
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            unreadable.append(path.name)
    return results, chained, unreadable


def _headline(
    results: Mapping[str, dict[str, Any]], name: str | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The evaluation at the top and, where there is one, the same with a blanked policy."""
    if name is not None and name not in results:
        raise ValueError(f"no evaluation {name!r} in this run; it has: {', '.join(results) or 'none'}")
    seeing = [k for k, r in results.items() if not r["description"].get("blank") and r["episodes"]]
    if name is None and not seeing:
        return None, None
    name = name or max(seeing, key=lambda k: (len(results[k]["episodes"]), -seeing.index(k)))
    best = results[name]

    def same(result: Mapping[str, Any]) -> bool:
        keys = {*result["description"], *best["description"]} - {"blank"}
        return all(result["description"].get(k) == best["description"].get(k) for k in keys)

    blanked = [r for r in results.values() if r["description"].get("blank") and r["episodes"] and same(r)]
    return best, max(blanked, key=lambda r: len(r["description"]["blank"]), default=None)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _absent(what: str) -> str:
    return f'<p class="absent">{escape(what)}: not there yet.</p>'


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0") + "&thinsp;%"


def _interval_bar(summary: Mapping[str, Any], label: str = "") -> str:
    """0 to 100 %: the interval as a band, the rate as a mark."""
    low, high = summary["wilson95"]
    rate = summary["rate"] or 0.0
    spoken = f"{escape(label)} {rate:.1%}, interval {low:.1%} to {high:.1%}"
    return (
        f'<svg class="interval" role="img" aria-label="{spoken}">'
        '<rect class="track" width="100%" y="8" height="6" rx="3"/>'
        f'<rect class="band" x="{100 * low:.2f}%" width="{100 * (high - low):.2f}%" y="5" height="12" '
        'rx="3"/>'
        f'<rect class="mark" x="{99 * rate:.2f}%" width="3" y="1" height="20" rx="1.5"/></svg>'
    )


def _hero(best: Mapping[str, Any] | None, blanked: Mapping[str, Any] | None) -> str:
    if best is None or not best["episodes"]:
        return f'<section class="hero">{_absent("Success rate")}</section>'
    cards = [_hero_card(best, "closed-loop success on seeds it never saw", "big")]
    if blanked is not None:
        inputs = " and ".join(str(x) for x in blanked["description"]["blank"])
        cards.append(_hero_card(blanked, f"the same policy with {inputs} blanked", "small"))
    else:
        cards.append(
            f'<div class="card small">{_absent("The same policy with images and depth blanked")}</div>'
        )
    return f'<section class="hero">{"".join(cards)}</section>'


def _hero_card(result: Mapping[str, Any], caption: str, size: str) -> str:
    summary = result["summary"]
    low, high = summary["wilson95"]
    planned = result["planned"]
    running = f" · {planned - summary['episodes']} still to play" if planned > summary["episodes"] else ""
    return (
        f'<div class="card {size}"><div class="figure">{_percent(summary["rate"])}</div>'
        f"<p>{escape(caption)}</p>{_interval_bar(summary, caption)}"
        f'<p class="note">{summary["successes"]} of {summary["episodes"]} episodes{running} · '
        f"95&thinsp;% Wilson interval {_percent(low)} to {_percent(high)}</p></div>"
    )


def _films(folder: Path, best: Mapping[str, Any] | None, blanked: Mapping[str, Any] | None) -> str:
    figures, budget = [], MAX_FILM_BYTES
    for result, kind in ((best, ""), (blanked, "blanked, ")):
        for episode in result["episodes"] if result else ():
            path = folder / str(episode.get("video", ""))
            if not episode.get("video") or not path.is_file() or path.stat().st_size > budget:
                continue
            budget -= path.stat().st_size
            caption = f"{kind}seed {episode['seed']}: {episode['outcome']}, {episode['steps']} steps"
            good = "good" if episode["success"] else "bad"
            figures.append(
                '<figure><video controls muted loop playsinline preload="metadata" '
                f'src="data:video/mp4;base64,{_base64(path)}"></video>'
                f'<figcaption><span class="dot {good}"></span>{escape(caption)}</figcaption></figure>'
            )
    return f'<div class="films">{"".join(figures)}</div>' if figures else _absent("Films of rollouts")


def _pictures(folder: Path) -> str:
    figures = [
        f'<figure class="picture"><img alt="{escape(path.stem)}" src="data:image/png;base64,{_base64(path)}">'
        f"<figcaption>{escape(path.stem.replace('_', ' '))}</figcaption></figure>"
        for path in sorted(folder.glob("*.png"))
    ]
    return "".join(figures) or _absent("A picture of a point map beside its RGB image")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _curves(path: Path, wanted: Sequence[tuple[str, str]] = CURVES) -> str:
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records.append({k: float(v) for k, v in record.items() if isinstance(v, int | float)})
        except (ValueError, AttributeError):
            continue  # the last line of a killed run may be half a line
    charts = []
    for key, title in wanted:
        points = [(r["step"], r[key]) for r in records if "step" in r and math.isfinite(r.get(key, math.nan))]
        if len(points) > 1:
            charts.append(_chart(title, points, logarithmic=key != "lr", smooth=key != "lr"))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else _absent("Training curves")


def _chart(title: str, points: Sequence[tuple[float, float]], logarithmic: bool, smooth: bool) -> str:
    """A line over steps. Noisy series get a running mean on top of the measured values."""
    width, height, left, bottom, top, right = 460, 240, 52, 28, 10, 12
    points = sorted(points)[:: -max(1, len(points) // 600)][::-1]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    logarithmic = logarithmic and min(ys) > 0 and max(ys) > 8 * min(ys)
    scale = math.log10 if logarithmic else float
    low, high = (scale(min(ys)), scale(max(ys))) if logarithmic else (min(0.0, min(ys)), max(ys))
    high = high if high > low else low + 1.0
    x_low, x_high = xs[0], max(xs[-1], xs[0] + 1)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (scale(y) - low) / (high - low) * (height - bottom - top)

    def line(values: Sequence[float], kind: str) -> str:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(xs, values))
        return f'<polyline class="{kind}" points="{path}"/>'

    if logarithmic:
        ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        ticks = [t for t in ticks if low <= math.log10(t) <= high]
    else:
        ticks = _ticks(low, high)
    marks = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text x="{left - 6}" y="{py(t) + 3.5:.1f}" text-anchor="end">{t:.3g}</text>'
        for t in ticks
    ]
    marks += [
        f'<text x="{px(t):.1f}" y="{height - 9}" text-anchor="middle">{t:g}</text>'
        for t in _ticks(x_low, x_high)
    ]
    lines = line(ys, "raw") + line(_running_mean(ys), "mean") if smooth else line(ys, "mean")
    suffix = ", log scale" if logarithmic else ""
    return (
        f"<figure><figcaption>{escape(title)}<span> by step{suffix}; last {ys[-1]:.3g}</span></figcaption>"
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}{lines}</svg></figure>"
    )


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _running_mean(values: Sequence[float]) -> list[float]:
    reach = max(1, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _table(results: Mapping[str, Mapping[str, Any]], unreadable: Sequence[str]) -> str:
    if not results and not unreadable:
        return _absent("Evaluations")
    head = (
        "Evaluation",
        "Successes",
        "Rate, 95 % interval",
        "",
        "Steps",
        "Crashes, time-outs",
        "Seeds",
        "Time",
    )
    rows = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    rows += [_table_row(name, result) for name, result in results.items()]
    rows += [f'<tr><td>{escape(n)}</td><td colspan="7">cannot be read</td></tr>' for n in unreadable]
    incidents = [
        f"<li>{escape(name)}, episode {i['episode']} (seed {i['seed']}, attempt {i['attempt']}): "
        f"{escape(str(i['kind']))}: {escape(str(i['error']))}</li>"
        for name, result in results.items()
        for i in result["incidents"]
    ]
    named = f"<details><summary>{len(incidents)} incidents</summary><ul>{''.join(incidents)}</ul></details>"
    return (
        f'<div class="wide"><table>{"".join(rows)}</table></div>'
        '<p class="note">Episode i of every evaluation starts from its first seed plus i, so rows with equal '
        "seeds are paired. Steps are the mean over the successes.</p>" + (named if incidents else "")
    )


def _table_row(name: str, result: Mapping[str, Any]) -> str:
    summary, seeds = result["summary"], [e["seed"] for e in result["episodes"]]
    low, high = summary["wilson95"]
    steps = summary["mean_steps_success"]
    planned = result["planned"]
    unfinished = f" (of {planned} planned)" if planned > summary["episodes"] else ""
    rate = "–" if summary["rate"] is None else f"{_percent(summary['rate'])} "
    cells = (
        escape(name),
        f"{summary['successes']}/{summary['episodes']}{unfinished}",
        f"{rate} [{_percent(low)}, {_percent(high)}]",
        _interval_bar(summary, name),
        "–" if steps is None else f"{steps:.1f}",
        f"{summary['crashes']}, {summary['timeouts']}",
        f"{min(seeds)}–{max(seeds)}" if seeds else "–",
        _duration(summary["seconds"]),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _phases(timings: Mapping[str, Mapping[str, Any]]) -> str:
    if not timings:
        return _absent("Seconds of each phase")
    total = sum(t["seconds"] for t in timings.values())
    rows = [
        f"<tr><td>{escape(phase)}</td><td>{_duration(t['seconds'])}</td><td>"
        f'<svg class="share"><rect class="mark" width="{100 * t["seconds"] / max(total, 1e-9):.1f}%" '
        'height="8" rx="1"/></svg></td>'
        f"<td><code>{escape(str(t.get('command', '')))}</code></td></tr>"
        for phase, t in timings.items()
    ]
    rows.append(f"<tr><th>in all</th><th>{_duration(total)}</th><th></th><th></th></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _facts(run_dir: Path, facts: Iterable[tuple[str, str]]) -> str:
    rows = [("Run directory", run_dir.name), *facts]
    weights = run_dir / "checkpoints" / "last" / "model.safetensors"
    if weights.is_file():
        rows.append(("Weights", f"{_count_parameters(weights)}{weights.stat().st_size / 1e6:.2f} MB"))
    else:
        rows.append(("Weights", "not there yet"))
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows)
    return f'<div class="wide"><table>{cells}</table></div>'


def _count_parameters(weights: Path) -> str:
    """Read off the safetensors header: eight bytes of length, then JSON."""
    try:
        with weights.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000)))
        count = sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"{count:,} numbers, "


def _config(path: Path) -> str:
    if not path.is_file():
        return _absent("The configuration")
    text = escape(path.read_text(errors="replace"))
    return f"<details><summary>The configuration</summary><pre>{text}</pre></details>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{task}</p></header>
<main>
{body}
</main>
<footer>Written by vilma, {date}. This file is complete by itself.</footer>
</body>
</html>
"""

STYLE = """
:root { --page: #f7f7f5; --card: #ffffff; --ink: #1d2126; --soft: #667080; --line: #e3e4e6; --accent: #2a62c9;
  --band: #a9c3f2; --good: #1c8750; --bad: #c2452f; }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1c1f24; --ink: #e7e9ec;
  --soft: #98a2b0; --line: #31363d; --accent: #84adff; --band: #35548f; --good: #4fc487; --bad: #f08a75; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.2rem 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { margin: .1rem 0 1.2rem; color: var(--soft); }
section { margin: 0 0 1.2rem; padding: 1.1rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
section.hero { display: grid; grid-template-columns: 3fr 2fr; gap: 1.2rem 2.4rem; }
h2 { margin: 0 0 .7rem; font-size: 1.05rem; }
.card .figure { font-weight: 650; letter-spacing: -0.03em; line-height: 1.1; }
.big .figure { font-size: 4.2rem; color: var(--accent); }
.small .figure { font-size: 2.6rem; color: var(--soft); margin-top: 1.35rem; }
.card p { margin: .2rem 0 .7rem; }
.note, figcaption span, footer, .absent { color: var(--soft); font-size: .88rem; }
.interval { display: block; overflow: visible; width: 100%; min-width: 110px; height: 22px; }
.track { fill: var(--line); } .band { fill: var(--band); } .mark { fill: var(--accent); }
.share { width: 160px; height: 8px; }
figure { margin: 0; } figcaption { font-size: .9rem; margin: .3rem 0; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1rem; }
video { width: 100%; border-radius: 8px; background: #000; display: block; }
.picture img { max-width: 100%; border-radius: 8px; background: #fff; }
.dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .45em; }
.dot.good { background: var(--good); } .dot.bad { background: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 1rem 1.6rem; }
.chart { width: 100%; height: auto; } .chart text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
polyline.raw { stroke: var(--band); stroke-width: 1; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } tr:last-child > * { border-bottom: 0; }
code, pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; padding: .9rem; border: 1px solid var(--line); border-radius: 8px; }
details { margin-top: .8rem; } summary { cursor: pointer; }
@media (max-width: 720px) { section.hero { grid-template-columns: 1fr; } .big .figure { font-size: 3.2rem; } }
"""

"""The report: complete by itself, whatever the run directory holds or lacks."""

import base64
import json
import math
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from vilma.evaluation import summarize, write_video
from vilma.report import read_timings, record_time, write_report

VOID = {"meta", "img", "rect", "line", "polyline"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page shows and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "poster", "data")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u2009", "").split())


def read(run) -> Page:
    return Page(write_report(run).read_text())


def result(successes, episodes, planned=None, blank=(), incidents=(), **episode):
    entries = [
        {
            "index": i,
            "seed": 500 + i,
            "success": i < successes,
            "steps": 40,
            "outcome": "success" if i < successes else "failure",
            **episode,
        }
        for i in range(episodes)
    ]
    return {
        "description": {"environment": {"name": "robosuite/Lift"}, "blank": list(blank), "seed": 500},
        "planned": planned or episodes,
        "summary": summarize(entries, incidents, 17.0),
        "incidents": list(incidents),
        "episodes": entries,
    }


@pytest.fixture
def run(tmp_path):
    """A run directory with everything in it."""
    run = tmp_path / "my <run> & more"
    (run / "eval" / "videos").mkdir(parents=True)
    (run / "pictures").mkdir()
    frames = [np.full((84, 84, 3), 5 * i, np.uint8) for i in range(6)]
    pytest.importorskip("imageio_ffmpeg")
    write_video(run / "eval" / "videos" / "a.mp4", frames)
    incident = {"episode": 3, "seed": 503, "attempt": 1, "kind": "crash", "error": "killed <here>"}
    main = result(49, 50, incidents=[incident])
    main["episodes"][0]["video"] = "videos/a.mp4"
    (run / "eval" / "robosuite_Lift.json").write_text(json.dumps(main))
    blanked = result(2, 50, blank=("images", "depth"))
    (run / "eval" / "robosuite_Lift_blank-images-depth.json").write_text(json.dumps(blanked))
    (run / "eval" / "other.json").write_text(json.dumps(result(3, 5, planned=50)))
    (run / "pictures" / "point_map.png").write_bytes(base64.b64decode(b"iVBORw0KGgo="))
    lines = [{"step": s, "loss": 3 / s, "lr": 1e-3, "grad_norm": 1.0} for s in range(10, 1000, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    (run / "config.yaml").write_text("policy: {type: pointmap}  # <b>bold</b>\n")
    record_time(run, "collect", 61.0, "vilma collect-robosuite --task Lift")
    record_time(run, "train", 100.0)
    record_time(run, "train", 150.5)
    return run


def test_everything_is_inside_and_nothing_is_loaded(run):
    path = write_report(run, [("Commit", "abc <1>")])
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert page.loads and all(load.startswith("data:") for load in page.loads)
    (video,) = [load for load in page.loads if load.startswith("data:video/mp4;base64,")]
    film = (run / "eval" / "videos" / "a.mp4").read_bytes()
    assert base64.b64decode(video.split(",")[1]) == film and b"avc1" in film
    assert [load for load in page.loads if load.startswith("data:image/png")]
    assert "not there yet" not in page.text.replace("Weights not there yet", "")
    assert len([t for t in page.tags if t == "polyline"]) == 5
    assert [p.name for p in run.glob("*.html*")] == ["report.html"]


def test_the_headline_and_its_blanked_twin(run):
    page = read(run)
    headline = page.text.index("98% closed-loop success on seeds it never saw")
    assert headline < page.text.index("4% the same policy with images and depth blanked")
    assert "49 of 50 episodes" in page.text
    # Wilson's interval of 49 of 50: scipy.stats.binomtest(49, 50).proportion_ci(method="wilson").
    assert "95% Wilson interval 89.5% to 99.6%" in page.text
    assert "3/5 (of 50 planned)" in page.text and "500–549" in page.text
    assert "robosuite_Lift, episode 3 (seed 503, attempt 1): crash: killed <here>" in page.text
    assert "seed 500: success, 40 steps" in page.text
    other = Page(write_report(run, headline="other").read_text())
    assert "60% closed-loop success" in other.text and "45 still to play" in other.text
    with pytest.raises(ValueError, match="no evaluation 'nothing'"):
        write_report(run, headline="nothing")


def test_phases_add_up_over_interrupted_runs(run):
    train = read_timings(run)["train"]
    assert train["seconds"] == 250.5 and train["runs"] == 2
    assert abs(train["ended"] - time.time()) < 600 and re.match("[0-9a-f]{12}|not a|unknown", train["commit"])
    text = read(run).text
    assert "collect 61.0 s vilma collect-robosuite --task Lift" in text
    assert "train 4 min 10 s" in text and "in all 5 min 12 s" in text


def test_what_is_foreign_is_escaped(run):
    text = write_report(run, [("Commit", "abc <1>")]).read_text()
    assert (
        "<run>" not in text
        and "<b>bold" not in text
        and "abc <1>" not in text
        and "killed <here>" not in text
    )
    assert "my &lt;run&gt; &amp; more" in text


def test_an_empty_run_is_a_page_that_says_what_is_missing(tmp_path):
    text = read(tmp_path).text
    assert text.count("not there yet") == 8
    for part in (
        "Success rate",
        "Films",
        "picture of a point map",
        "curves",
        "Evaluations",
        "Seconds",
        "Weights",
    ):
        assert part in text
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "absent")


def test_damaged_parts_are_named_and_the_rest_is_shown(run):
    (run / "eval" / "half.json").write_text('{"episodes": [')
    (run / "eval" / "foreign.json").write_text('{"episodes": 3, "summary": {"wilson95": "x"}}')
    (run / "eval" / "list.json").write_text("[]")
    (run / "metrics.jsonl").write_text('3\n{"step": 1, "loss": NaN}\n[]\nnoise\n{"step": "x"}\n')
    (run / "timings.json").write_text("[1]")
    (run / "config.yaml").write_bytes(b"\xff\xfe: [")
    (run / "checkpoints" / "last").mkdir(parents=True)
    (run / "checkpoints" / "last" / "model.safetensors").write_bytes(b"\x05")
    text = read(run).text
    for name in ("half.json", "foreign.json", "list.json"):
        assert f"{name} cannot be read" in text
    assert "98% closed-loop success" in text and "Training curves: not there yet" in text
    record_time(run, "train", 1.0)
    assert list(read_timings(run)) == ["train"] and read_timings(run)["train"]["seconds"] == 1.0


@pytest.mark.parametrize("values", [[0.5], [1e-9, 1e3] * 900, [0.0, 0.0], [-1.0, 2.0], [3.0] * 5])
def test_curves_of_any_values_stay_inside_their_axes(tmp_path, values):
    lines = [json.dumps({"step": i + 1, "loss": v}) for i, v in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = write_report(tmp_path).read_text()
    points = [p for line in re.findall(r'<polyline[^>]*points="([^"]*)"', text) for p in line.split()]
    assert bool(points) == (len(values) > 1)
    for point in points:
        x, y = map(float, point.split(","))
        assert math.isfinite(x) and math.isfinite(y) and 0 <= x <= 460 and 0 <= y <= 240


def test_parameters_are_counted_from_the_safetensors_header(tmp_path):
    from safetensors.numpy import save_file

    folder = tmp_path / "checkpoints" / "last"
    folder.mkdir(parents=True)
    save_file(
        {"a": np.zeros((300, 10), np.float32), "b": np.zeros(7, np.float32)}, folder / "model.safetensors"
    )
    assert "3,007 numbers, 0.01 MB" in read(tmp_path).text

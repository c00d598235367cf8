"""``vilma report``: the page with what only the tool can add: a picture of the data, the facts."""

import numpy as np
import pytest

from vilma import config
from vilma.tools import report as tool

h5py = pytest.importorskip("h5py")


@pytest.fixture
def run(tmp_path):
    """A run whose data shows a table one metre below a camera that looks straight down."""
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = 15
        obs = data.create_group("demo_0/obs")
        obs["top_image"] = np.random.default_rng(0).integers(0, 255, (15, 8, 8, 3), np.uint8)
        obs["top_depth"] = np.ones((15, 8, 8, 1), np.float32)
        obs["top_intrinsic"] = np.tile(np.array([[8, 0, 4], [0, 8, 4], [0, 0, 1]], np.float32), (15, 1, 1))
        obs["top_extrinsic"] = np.tile(np.diag([1, -1, -1, 1]).astype(np.float32), (15, 1, 1))
    values = {
        "policy": {"cameras": ["top"], "workspace": [[-1, -1, -2], [1, 1, 0]], "reference_frame": "world"},
        "data": {"path": str(path)},
    }
    (tmp_path / "run").mkdir()
    config.dump(values, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def test_the_page_has_a_point_map_and_the_facts(run, capsys):
    assert tool.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    picture = run / "pictures" / "point_map.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = picture.stat().st_mtime_ns
    page = (run / "report.html").read_text()
    assert "data:image/png;base64," in page and "demos.hdf5" in page
    assert "1 episodes, 15 frames" in page and "torch" in page and "Commit" in page
    tool.main([str(run)])
    assert picture.stat().st_mtime_ns == drawn


def test_data_without_depth_still_makes_a_page(run, capsys):
    with h5py.File(run.parent / "demos.hdf5", "a") as file:
        del file["data/demo_0/obs/top_depth"]
    assert tool.main([str(run)]) == 0
    assert "no picture of a point map" in capsys.readouterr().err
    (run.parent / "demos.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n half of a file")
    assert tool.main([str(run)]) == 0


def test_an_empty_run_makes_a_page(tmp_path):
    assert tool.main([str(tmp_path)]) == 0
    assert "Data set" in (tmp_path / "report.html").read_text()
    with pytest.raises(FileNotFoundError):
        tool.main([str(tmp_path / "absent")])

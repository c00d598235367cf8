"""``vilma report``: the page with what only the tool can add: a picture of the data, the facts."""

import os

import numpy as np
import pytest
import torch

from vilma import config
from vilma.policies import PointMapPolicy
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


@pytest.fixture
def drawn(monkeypatch):
    """What each drawing was given: images, depths and point maps by camera."""
    calls = []
    from vilma.pointmap import view

    def figure(images, depths, maps, path, title):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"drawn")
        calls.append((images, depths, maps))

    monkeypatch.setattr(view, "figure", figure)
    return calls


@pytest.mark.parametrize("frame", ["world", "camera"])
@pytest.mark.parametrize("depth_range", [None, [0.5, 3.0]])
def test_the_point_map_is_the_one_that_the_policy_sees(run, drawn, frame, depth_range):
    """Compared with the picture that the policy itself makes for its encoder."""
    config_path, rng = run / "config.yaml", np.random.default_rng(1)
    depth = rng.uniform(0.2, 8.0, (15, 8, 8, 1)).astype(np.float32)
    with h5py.File(run.parent / "demos.hdf5", "a") as file:
        file["data/demo_0/obs/top_depth"][...] = depth
        image = file["data/demo_0/obs/top_image"][12]
        intrinsic, extrinsic = (file[f"data/demo_0/obs/top_{x}"][12] for x in ("intrinsic", "extrinsic"))
    values = config.read(config_path)
    values["policy"] = {
        "cameras": ["top"],
        "crops": {"top": [1, 2, 5, 4]},
        "workspace": [[-1, -1, -7], [1, 1, 7]],
        "reference_frame": frame,
        "depth_range": depth_range,
    }
    config.dump(values, config_path)
    assert tool.main([str(run)]) == 0
    sizes = {"action_dim": 7, "action_kind": "delta", "dim": 16, "num_blocks": 1, "num_heads": 2}
    policy = PointMapPolicy.from_config(
        values["policy"] | sizes | {"modality": "xyz", "xyz_encoder": "spatial_softmax"}
    ).eval()
    arrays = {"depth": depth[12, ..., 0], "intrinsics": intrinsic, "pose": extrinsic}
    obs = {f"observation.{part}.top": torch.as_tensor(value)[None, None] for part, value in arrays.items()}
    seen = policy.pictures(obs | {"task": ["x"]}, "top")["xyz"][0]
    ((images, depths, maps),) = drawn
    torch.testing.assert_close(maps["top"].to_image(mask=True), seen)
    assert maps["top"].frame == frame
    np.testing.assert_array_equal(images["top"], image[1:6, 2:6])
    np.testing.assert_array_equal(depths["top"], depth[12, 1:6, 2:6, 0])


def test_the_picture_is_drawn_again_when_it_is_older_than_its_sources(run, drawn):
    picture, data = run / "pictures" / "point_map.png", run.parent / "demos.hdf5"
    tool.main([str(run)])
    assert len(drawn) == 1
    for number, source in enumerate((data, run / "config.yaml"), start=2):
        os.utime(picture, ns=(0, source.stat().st_mtime_ns - 1))
        tool.main([str(run)])
        tool.main([str(run)])
        assert len(drawn) == number
    os.utime(picture, ns=(0, 0))
    data.rename(data.with_suffix(".gone"))
    tool.main([str(run)])
    assert picture.exists() and len(drawn) == 3


def test_a_policy_without_points_gets_no_point_map(run, drawn):
    values = config.read(run / "config.yaml")
    values["policy"]["modality"] = "rgb"
    config.dump(values, run / "config.yaml")
    assert tool.main([str(run)]) == 0 and not drawn


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

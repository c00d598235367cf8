"""The page that turns: what it embeds, and what a browser draws of it."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.orbit import Shot, write_orbit

from .test_view import scene

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def embedded(path):
    text = re.search(r'<script id="scene" type="application/json">(.*?)</script>', path.read_text(), re.S)
    return json.loads(text.group(1))


def shot(shift=0.0):
    rgb, depth, camera = scene()
    seen = PointMap.from_depth(depth + np.float32(shift) * (depth > 0), camera, frame="world")
    return Shot(seen, rgb, camera)


def test_the_page_holds_the_clouds(tmp_path):
    path = write_orbit([{"top": shot()}, {"top": shot(0.02)}], tmp_path / "sub" / "a.html", "a </script> & b")
    page = path.read_text()
    assert not re.search(r"https?://|src=|href=|import\(|fetch\(", page), "the page must need nothing else"
    assert "a &lt;/script&gt; &amp; b" in page
    data = embedded(path)
    assert data["names"] == ["top"] and data["up"] == [0, 0, 1] and len(data["moments"]) == 2
    low, high = np.array(data["low"]), np.array(data["high"])
    for (packed,), one in zip(data["moments"], (shot(), shot(0.02)), strict=True):
        places = np.frombuffer(base64.b64decode(packed["places"]), "<u2").reshape(-1, 3) / 65535
        points, colors = one.point_map.to_cloud(colors=one.rgb)
        np.testing.assert_allclose(places * (high - low) + low, points, atol=(high - low).max() / 65535)
        assert base64.b64decode(packed["colors"]) == colors.numpy().tobytes()
        frustum = np.array(packed["frustum"])
        np.testing.assert_allclose(frustum[0], one.camera.pose[:3, 3])
        uv, _ = one.camera.project(torch.tensor(frustum[1:]))
        np.testing.assert_allclose(uv, [[0, 0], [47, 0], [47, 39], [0, 39]], atol=1e-4)


def test_dense_clouds_are_thinned_and_empty_ones_refused(tmp_path):
    path = write_orbit([{"a": shot(), "b": shot()}], tmp_path / "a.html", most=500)
    (first, second), total = embedded(path)["moments"][0], 40 * 45
    assert first["count"] == second["count"] and total / 8 <= first["count"] <= 250
    gray = write_orbit([{"</script>": Shot(shot().point_map)}], tmp_path / "b.html")
    assert embedded(gray)["names"] == ["</script>"], "a name does not end the page's script"
    assert set(base64.b64decode(embedded(gray)["moments"][0][0]["colors"])) == {200}
    own = PointMap.from_depth(scene()[1], Camera.from_fov(45.0, (40, 48)), frame="camera")
    assert embedded(write_orbit([{"": Shot(own)}], tmp_path / "c.html"))["up"] == [0, -1, 0]
    nothing = PointMap.from_depth(np.zeros((4, 4), np.float32), Camera.from_fov(45.0, (4, 4)))
    with pytest.raises(ValueError, match="no valid point"):
        write_orbit([{"a": Shot(nothing)}], tmp_path / "d.html")


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_draws_the_cube_where_it_is(tmp_path):
    """Seen from straight above, x to the right: the red cube's centre is where pinhole arithmetic puts it."""
    from PIL import Image

    page, picture = write_orbit([{"top": shot()}], tmp_path / "a.html"), tmp_path / "a.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,600"]
    command += [f"--screenshot={picture}", f"--user-data-dir={tmp_path}/profile"]
    # turn -pi/2: north (y) points up on the screen; tilt pi/2: from above.
    place = f"file://{page}#turn={-np.pi / 2}&tilt={np.pi / 2}&far=1"
    subprocess.run([*command, place], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)
    red[:250, :350] = False  # the panel
    assert red.sum() > 400
    one = shot()
    points, colors = (x.numpy() for x in one.point_map.to_cloud(colors=one.rgb))
    cube = points[colors[:, 1] < 10].mean(0)
    center = (points.min(0) + points.max(0)) / 2
    height, width = pixels.shape[:2]
    scale = 1.2 * min(height, width) / (1 - (cube - center)[2])
    rows, columns = red.nonzero()
    expected = width / 2 + scale * (cube - center)[0], height / 2 - scale * (cube - center)[1]
    np.testing.assert_allclose([columns.mean(), rows.mean()], expected, atol=4)

"""Clouds as one HTML page to turn with the mouse: no network, no WebGL, drawn by a few lines of JavaScript.

Points are stored in 16 bits an axis over the scene's box, so a place is off by at most 1/131070 of its width.
"""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from .camera import Camera
from .ply import color_bytes, numpy_array, replacing
from .point_map import PointMap
from .view import scene_bounds

Array = np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Shot:
    """One camera at one moment: its point map (H, W), colours (3, H, W) or (H, W, 3), and where it stood."""

    point_map: PointMap
    rgb: Array | None = None
    camera: Camera | None = None


def write_orbit(
    moments: Sequence[Mapping[str, Shot]],
    path: str | os.PathLike,
    title: str = "point map",
    up: Sequence[float] | None = None,
    most: int = 200_000,
) -> Path:
    """Write the page: a slider over the moments, the cameras of each by name.

    up: what stands upright, by default z, or -y for points in a camera's own frame. most: points of a moment;
    denser ones are thinned evenly. Points far outside the scene (a distant wall) are left out.

    Raises ValueError when there is no valid point at all.
    """
    maps = [shot.point_map for shots in moments for shot in shots.values()]
    if not maps or not any(bool(seen.valid.any()) for seen in maps):
        raise ValueError("there is no valid point to show: look at depth_range, the workspace and the depth")
    frame = maps[0].frame
    if up is None:
        up = (0, -1, 0) if frame == "camera" else (0, 0, 1)
    low, high = scene_bounds(maps)
    margin = 0.5 * (high - low).max()
    low, high = low - margin, high + margin
    names = sorted({name for shots in moments for name in shots})
    # One map at a time: an episode of clouds need not fit in memory twice.
    packed = [
        [_packed(name, shot, low, high, most // max(len(shots), 1)) for name, shot in shots.items()]
        for shots in moments
    ]
    scene = {
        "low": low.tolist(),
        "high": high.tolist(),
        "up": list(up),
        "frame": frame or "",
        "names": names,
        "moments": packed,
    }
    text = json.dumps(scene).replace("</", "<\\/")  # a name must not end the script
    page = _PAGE.replace("{{title}}", html.escape(title)).replace("{{scene}}", text)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _packed(name: str, shot: Shot, low: np.ndarray, high: np.ndarray, most: int) -> dict:
    seen = shot.point_map
    if shot.rgb is None:
        points = numpy_array(seen.to_cloud())
        colors = np.full_like(points, 200, dtype=np.uint8)
    else:
        points, colors = (numpy_array(x) for x in seen.to_cloud(colors=shot.rgb))
    inside = ((points >= low) & (points <= high)).all(-1)
    points, colors = points[inside], color_bytes(colors[inside])
    stride = -(-len(points) // max(most, 1)) or 1
    places = ((points[::stride] - low) / (high - low) * 65535).round().astype("<u2")
    packed = {
        "name": name,
        "count": len(places),
        "places": base64.b64encode(places.tobytes()).decode(),
        "colors": base64.b64encode(colors[::stride].tobytes()).decode(),
    }
    if shot.camera is not None:
        packed["frustum"] = _frustum(shot.camera, 0.06 * float((high - low).max())).tolist()
    return packed


def _frustum(camera: Camera, length: float) -> np.ndarray:
    """(5, 3): the centre and the corners of the picture at that distance, clockwise from the top left."""
    rays = numpy_array(camera.to(dtype=camera.pose.dtype).rays()).astype(np.float64)
    pose = numpy_array(camera.pose).astype(np.float64)
    corners = rays[[0, 0, -1, -1], [0, -1, -1, 0]]
    corners = corners / np.linalg.norm(corners, axis=-1, keepdims=True) * length
    return np.concatenate([np.zeros((1, 3)), corners]) @ pose[:3, :3].T + pose[:3, 3]


_PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title>
<style>
html,body{margin:0;height:100%;background:#16181d;color:#d7dae0;overflow:hidden}
body{font:13px/1.5 system-ui,sans-serif}
canvas{position:absolute;inset:0;width:100%;height:100%;cursor:grab;touch-action:none}
#bar{position:absolute;left:12px;top:10px;background:#20242ccc;padding:8px 12px;border-radius:8px}
#bar{max-width:22em}
#bar h1{font-size:14px;margin:0 0 4px}#bar label{margin-right:10px;white-space:nowrap}
#bar input[type=range]{width:11em;vertical-align:middle}#bar div{margin-top:3px}
#note{color:#8a919e}
</style></head><body><canvas id="view"></canvas>
<div id="bar"><h1>{{title}}</h1>
<div id="cameras"></div>
<div>colour <select id="mode"><option>rgb</option><option>xyz</option><option>camera</option></select>
 <label><input type="checkbox" id="lines" checked>cameras and axes</label></div>
<div>size <input type="range" id="size" min="0.3" max="4" step="0.1" value="1.4"></div>
<div id="time">moment <input type="range" id="moment" min="0" value="0"> <span id="which"></span></div>
<div id="note"></div></div>
<script id="scene" type="application/json">{{scene}}</script>
<script>
"use strict";
const scene = JSON.parse(document.getElementById("scene").textContent);
const byId = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const width = scene.high.map((h, k) => h - scene.low[k]);
const reach = Math.max(...width) / 2;  // the box has a margin of a quarter of it on each side
const palette = [[255,120,90],[90,170,255],[130,220,110],[240,200,80],[200,130,240],[110,220,220]];
const moments = scene.moments.map(shots => shots.map(shot => {
  const q = new Uint16Array(bytes(shot.places).buffer), p = new Float32Array(q.length);
  for (let i = 0; i < q.length; i++) p[i] = scene.low[i % 3] + q[i] / 65535 * width[i % 3];
  return {name: shot.name, p, c: bytes(shot.colors), frustum: shot.frustum};
}));
// The tight box of all points, for the colours and the centre of the view.
const lo = [1/0, 1/0, 1/0], hi = [-1/0, -1/0, -1/0];
for (const shots of moments) for (const s of shots) for (let i = 0; i < s.p.length; i++) {
  const k = i % 3; if (s.p[i] < lo[k]) lo[k] = s.p[i]; if (s.p[i] > hi[k]) hi[k] = s.p[i];
}
const cross = (a, b) => [a[1]*b[2]-a[2]*b[1], a[2]*b[0]-a[0]*b[2], a[0]*b[1]-a[1]*b[0]];
const dot = (a, b) => a[0]*b[0] + a[1]*b[1] + a[2]*b[2];
const unit = a => { const n = Math.hypot(...a); return a.map(x => x / n); };
const up = unit(scene.up), east = unit(Math.abs(up[0]) < 0.9 ? cross(cross(up, [1,0,0]), up) : [0,1,0]);
const north = cross(up, east);
const own = scene.frame === "camera";  // its points look best from near the camera
const start = () => ({turn: own ? -1.3 : -1.0, tilt: own ? 0.25 : 0.5, far: 1.5 * reach,
  at: lo.map((l, k) => (l + hi[k]) / 2)});
let eye = start();
const asked = new URLSearchParams(location.hash.slice(1));
for (const key of ["turn", "tilt", "far"]) if (asked.has(key)) eye[key] = Number(asked.get(key));
const shown = new Set(scene.names);
for (const [k, name] of scene.names.entries()) {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.checked = true;
  box.onchange = () => { box.checked ? shown.add(name) : shown.delete(name); draw(); };
  label.append(box, name || "camera"); label.style.color = `rgb(${palette[k % palette.length]})`;
  byId("cameras").append(label);
}
byId("moment").max = moments.length - 1;
if (moments.length < 2) byId("time").style.display = "none";
for (const id of ["mode", "lines", "size", "moment"]) byId(id).oninput = () => draw();

const canvas = byId("view"), context = canvas.getContext("2d");
let image, pixels, near;
function basis() {
  const c = Math.cos(eye.tilt), s = Math.sin(eye.tilt), ct = Math.cos(eye.turn), st = Math.sin(eye.turn);
  const out = up.map((u, k) => c * (ct * east[k] + st * north[k]) + s * u);  // from the centre to the eye
  const right = up.map((u, k) => -st * east[k] + ct * north[k]);
  return {right, above: cross(out, right), out};
}
function draw() {
  const w = canvas.width = canvas.clientWidth, h = canvas.height = canvas.clientHeight;
  if (!w || !h) return;
  if (!image || image.width !== w || image.height !== h) {
    image = new ImageData(w, h); pixels = new Uint32Array(image.data.buffer); near = new Float32Array(w * h);
  }
  pixels.fill(0xff1d1816); near.fill(1/0);
  const {right, above, out} = basis(), f = 1.2 * Math.min(w, h), mode = byId("mode").value;
  const place = (x, y, z) => {
    const d = [x - eye.at[0], y - eye.at[1], z - eye.at[2]], depth = eye.far - dot(d, out);
    return [w / 2 + f * dot(d, right) / depth, h / 2 - f * dot(d, above) / depth, depth];
  };
  const size = Number(byId("size").value);
  let count = 0;
  for (const shot of moments[Number(byId("moment").value)]) {
    if (!shown.has(shot.name)) continue;
    const {p, c} = shot, n = p.length / 3, tint = palette[scene.names.indexOf(shot.name) % palette.length];
    // A point is about as large as its neighbour is far: reach / sqrt(n) metres.
    const radius = size * reach / Math.sqrt(n) * f * 0.9;
    count += n;
    for (let i = 0; i < 3 * n; i += 3) {
      const x = p[i] - eye.at[0], y = p[i+1] - eye.at[1], z = p[i+2] - eye.at[2];
      const depth = eye.far - (x * out[0] + y * out[1] + z * out[2]);
      if (depth < 0.02 * reach) continue;
      const u = w / 2 + f * (x * right[0] + y * right[1] + z * right[2]) / depth;
      const v = h / 2 - f * (x * above[0] + y * above[1] + z * above[2]) / depth;
      const half = Math.min(6, Math.max(0.5, radius / depth / 2));
      const u0 = Math.max(0, Math.round(u - half)), u1 = Math.min(w, Math.round(u + half));
      const v0 = Math.max(0, Math.round(v - half)), v1 = Math.min(h, Math.round(v + half));
      if (u0 >= u1 || v0 >= v1) continue;
      let r, g, b;
      if (mode === "rgb") { r = c[i]; g = c[i+1]; b = c[i+2]; }
      else if (mode === "xyz") {
        r = 30 + 225 * (p[i] - lo[0]) / (hi[0] - lo[0] + 1e-9);
        g = 30 + 225 * (p[i+1] - lo[1]) / (hi[1] - lo[1] + 1e-9);
        b = 30 + 225 * (p[i+2] - lo[2]) / (hi[2] - lo[2] + 1e-9);
      } else [r, g, b] = tint;
      const color = 0xff000000 | (b << 16) | (g << 8) | r;
      for (let v = v0; v < v1; v++) for (let u = u0, j = v * w + u0; u < u1; u++, j++)
        if (depth < near[j]) { near[j] = depth; pixels[j] = color; }
    }
  }
  context.putImageData(image, 0, 0);
  byId("which").textContent = `${Number(byId("moment").value) + 1} of ${moments.length}`;
  const frame = scene.frame && `, frame ${scene.frame}`;
  byId("note").textContent = `${count.toLocaleString("en")} points${frame}` +
    ". Drag: turn, right or shift: move, wheel: closer, double click: back.";
  if (!byId("lines").checked) return;
  const line = (a, b, color) => {
    a = place(...a); b = place(...b);
    if (a[2] < 0.02 * reach || b[2] < 0.02 * reach) return;
    context.strokeStyle = color; context.beginPath(); context.moveTo(a[0], a[1]); context.lineTo(b[0], b[1]);
    context.stroke();
  };
  context.lineWidth = 1.5;
  const origin = lo, length = 0.12 * reach;
  ["#ff5555", "#55dd55", "#6688ff"].forEach((color, k) => {
    const end = origin.slice(); end[k] += length; line(origin, end, color);
    const at = place(...end); context.fillStyle = color; context.fillText("xyz"[k], at[0] + 3, at[1] - 3);
  });
  for (const shot of moments[Number(byId("moment").value)]) {
    if (!shot.frustum || !shown.has(shot.name)) continue;
    const color = `rgb(${palette[scene.names.indexOf(shot.name) % palette.length]})`, q = shot.frustum;
    for (let k = 1; k < 5; k++) { line(q[0], q[k], color); line(q[k], q[k % 4 + 1], color); }
  }
}
let held = null;
canvas.onpointerdown = e => { held = {x: e.clientX, y: e.clientY, move: e.button === 2 || e.shiftKey};
  canvas.setPointerCapture(e.pointerId); };
canvas.onpointerup = () => { held = null; };
canvas.onpointermove = e => {
  if (!held) return;
  const dx = e.clientX - held.x, dy = e.clientY - held.y; held.x = e.clientX; held.y = e.clientY;
  if (held.move) {
    const {right, above} = basis(), k = eye.far / (1.2 * Math.min(canvas.width, canvas.height));
    eye.at = eye.at.map((a, i) => a - k * dx * right[i] + k * dy * above[i]);
  } else {
    eye.turn -= 0.008 * dx; eye.tilt = Math.min(1.55, Math.max(-1.55, eye.tilt + 0.008 * dy));
  }
  requestAnimationFrame(draw);
};
canvas.onwheel = e => {
  e.preventDefault(); eye.far *= Math.exp(0.001 * e.deltaY); requestAnimationFrame(draw);
};
canvas.oncontextmenu = e => e.preventDefault();
canvas.ondblclick = () => { eye = start(); draw(); };
window.onresize = draw;
draw();
document.body.dataset.drawn = "yes";
</script></body></html>
"""

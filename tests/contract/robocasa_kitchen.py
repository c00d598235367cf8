"""A kitchen for RoboCasa without its 10 GB of assets: one drawer stack, a counter and a cabinet.

Works on a throw-away copy of the installed package (or of a source tree), which holds the cabinets, panels,
handles and counters but neither meshes of appliances nor textures. Of 0.2 it furnishes layout 0, of 1.x
layout 1. Not a benchmark: it shows that the contract holds.
"""

import importlib.util
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

TILES = 8

# The tasks' objects have no meshes here; sampling them would fail.
NO_OBJECTS = """

def _without_objects(task):
    task._get_obj_cfgs = lambda self: []
    for variant in task.__subclasses__():
        _without_objects(variant)


_without_objects(Kitchen)
"""


def main(target: Path, source: Path | None = None) -> None:
    """Copy robocasa to ``target`` and furnish a layout."""
    found = importlib.util.find_spec("robocasa")
    if source is None and (found is None or not found.origin):
        raise SystemExit("robocasa is not installed here")
    package = target / "robocasa"
    origin = source / "robocasa" if source else Path(found.origin).parent
    shutil.copytree(origin, package, dirs_exist_ok=True)
    assets = package / "models" / "assets"
    furnish(assets)
    style(assets)
    complete(assets)
    with (package / "__init__.py").open("a") as file:
        file.write(NO_OBJECTS)


def furnish(assets: Path) -> None:
    names = ("layout001.yaml", "one_wall_small.yaml")
    layout = next(path for name in names for path in (assets / "scenes").rglob(name))
    room = layout.read_text().split("# Wall accessories")[0]
    layout.write_text(
        room
        + """
main_group:
  group_origin: [0, 0]
  group_pos: [0, 0]
  group_z_rot: 0
  bottom:
    - name: stack
      type: stack
      size: [0.6, 0.6, 0.92]
      levels: [drawer, drawer]
      percentages: [0.6, 0.4]
      pos: [1.5, -0.35, 0.46]
    - name: counter
      type: counter
      size: [1.5, 0.65, 0.92]
      pos: [2.6, -0.325, 0.46]
  top:
    - name: cab
      type: single_cabinet
      size: [0.5, 0.4, 0.92]
      pos: [2.0, -0.2, 1.85]
"""
    )


def style(assets: Path) -> None:
    file = next((assets / "scenes").rglob("style001.yaml"), None)
    if file is None:  # 0.2: what its first style names is in the repository
        return
    text = re.sub(r"(?m)^(\s*default: )\[.*\]$", r"\1[gray, slab, handle_bar]", file.read_text(), count=1)
    file.write_text(text)


def complete(assets: Path) -> None:
    """Every texture that a registry names, as a small tile of one colour."""
    for registry in (assets / "fixtures" / "fixture_registry").glob("*.yaml"):
        for name in re.findall(r"textures/[\w/]+\.png", registry.read_text()):
            picture = assets / name
            if not picture.is_file():
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(png(zlib.crc32(name.encode())))


def png(color: int) -> bytes:
    """A tile of 8 x 8 pixels in a colour and a darker one, so that a frame is not flat."""
    tones = [bytes((color >> shift & 127) + 60 for shift in (0, 8, 16)), bytes([40, 50, 60])]
    rows = b"".join(b"\0" + b"".join(tones[(x + y) % 2] for x in range(TILES)) for y in range(TILES))

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack("!I", len(content)) + checked + struct.pack("!I", zlib.crc32(checked))

    header = struct.pack("!2I5B", TILES, TILES, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

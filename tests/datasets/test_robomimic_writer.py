"""The promises of the writer, against real kills and real full disks; the rest is in test_robomimic.py."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vilma.datasets.robomimic_writer import file_attributes, finished_parts, merge

h5py = pytest.importorskip("h5py")

FACTS = {
    "env_args": {"env_name": "Lift", "type": 1, "env_kwargs": {}},
    "attributes": {"reference_frame": "world", "action_kind": "delta"},
}

WRITER = """
    import json, sys
    import numpy as np
    from vilma.datasets import robomimic_writer as robomimic

    path, start, facts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (30, 84, 84, 3), dtype=np.uint8)

    def write(index):
        robomimic.write_part(path, index, actions=np.full((30, 7), index), obs={"a_image": noise})

    def merge(**options):
        robomimic.merge(path, **facts, **options)
"""


def start_writer(path: Path, start: int, body: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen:
    code = textwrap.dedent(WRITER) + textwrap.dedent(body)
    command = [*wrapper, sys.executable, "-c", code, str(path), str(start), json.dumps(FACTS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.filterwarnings("error::UserWarning")  # a part that had to be removed would be one
def test_sigkill_while_writing_loses_nothing_finished(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.hdf5", random.Random(0)
    told = set()
    for _ in range(4):
        body = "for index in range(start, 10_000): write(index); print(index, flush=True)"
        child = start_writer(path, len(told), body)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        told = set(range(1 + max([len(told), *(int(word) for word in rest)])))
        found = finished_parts(path)
        assert told <= found and len(found - told) <= 1  # one may be finished and not yet told
        told = found
    merge(path, **FACTS)
    with h5py.File(path, "r") as file:
        assert len(file["data"]) == len(told) >= 4
        for index in told:
            assert (file[f"data/demo_{index}/actions"][:] == index).all()
            assert file[f"data/demo_{index}/obs/a_image"][29].std() > 50
    assert [p.name for p in tmp_path.iterdir()] == ["x.hdf5"]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("action", ["write(2)", "merge()"])
def test_killed_in_the_middle_of_a_file(tmp_path: Path, action: str) -> None:
    """The kernel ends the process (SIGXFSZ) when its file passes 300 kB: half of it is on disk."""
    path = tmp_path / "x.hdf5"
    body = f"""
    import resource, signal
    write(0), write(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    {action}
    """
    child = start_writer(path, 0, body)
    child.communicate()
    assert child.returncode == -signal.SIGXFSZ
    assert finished_parts(path) == {0, 1} and not path.exists()
    merge(path, **FACTS)
    assert file_attributes(path)["num_demos"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.hdf5"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_sigkill_while_merging_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.hdf5", random.Random(0)
    child = start_writer(path, 0, "for index in range(8): write(index)")
    assert child.communicate() and child.returncode == 0
    seen_unfinished = 0
    for kill in range(40):  # at least four, and more until two fell into a merge
        if kill >= 4 and seen_unfinished >= 2:
            break
        body = "merge(keep_parts=True)\nprint('ready', flush=True)\nwhile True: merge(keep_parts=True)"
        child = start_writer(path, 0, body)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        seen_unfinished += (tmp_path / ".x.hdf5.tmp").exists()
        assert not path.exists() or file_attributes(path)["num_demos"] == 8
        assert finished_parts(path) == set(range(8))
    assert seen_unfinished, "no kill fell into a merge: the test shows nothing"
    merge(path, **FACTS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.hdf5"]


def full_disk(kind: str, folder: Path) -> tuple[tuple[str, ...], str]:
    """A command prefix and a preamble under which ``folder`` has 5 MB of room."""
    if kind == "rlimit":
        return (), "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
    mount = f"mount -t tmpfs -o size=5m tmpfs {folder}"
    prefix = ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("a small file system needs mount in a namespace of its own, which is not allowed here")
    return prefix, ""


@pytest.mark.parametrize("kind", ["tmpfs", "rlimit"])
def test_full_disk(tmp_path: Path, kind: str) -> None:
    """On a real 5 MB file system, and under a limit of 3 MB a file, where writes fail in the same places."""
    prefix, preamble = full_disk(kind, tmp_path)
    body = f"""
    {preamble}
    import os, pathlib
    written = 0
    try:
        for index in range(4 if {kind == "rlimit"} else 100):
            write(index)
            written += 1
        if {kind == "rlimit"}:
            noise = np.concatenate([noise] * 8)
            robomimic.write_part(path, 99, actions=np.zeros((240, 7)), obs={{"a_image": noise}})
    except OSError as error:
        print("write", error.errno, error)
    assert written >= 2
    for _ in range(3):
        try:
            merge()
        except OSError as error:
            print("merge", error.errno, error)
    print("left", sorted(os.listdir(pathlib.Path(path).parent)), len(os.listdir(path + ".parts")))
    print("usable", len(robomimic.finished_parts(path)), "written", written)
    for index in range(1, written):
        os.unlink(f"{{path}}.parts/demo_{{index}}.hdf5")
    merge()
    print("then", robomimic.file_attributes(path)["num_demos"])
    """
    child = start_writer(tmp_path / "x.hdf5", 0, textwrap.dedent(body), prefix)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    lines = out.splitlines()
    number = errno.EFBIG if kind == "rlimit" else errno.ENOSPC
    assert (
        lines[0].startswith(f"write {number} ")
        and "finished episodes in" in lines[0]
        and "are safe" in lines[0]
    )
    assert len(lines) == 7
    for line in lines[1:4]:
        assert line.startswith(f"merge {number} ") and "are safe" in line and ".x.hdf5.tmp" in line
    written = int(lines[5].split()[-1])
    assert lines[4] == f"left ['x.hdf5.parts'] {written}"  # no unfinished file stays behind
    assert lines[5] == f"usable {written} written {written}"
    assert lines[6] == "then 1"


def test_the_writer_needs_no_torch() -> None:
    code = "import sys, vilma.datasets.robomimic_writer; sys.exit(bool({'torch', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Names, messages and imports of vilma.envs: no simulator is started in this process."""

import importlib.util
import os
import subprocess
import sys

import pytest

import vilma.envs
from vilma.envs import find_task, make, tasks

needs_gymnasium = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="needs the extra robot"
)
needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra robot"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_task_table():
    robosuite = {name: task for name, task in tasks().items() if task.suite == "robosuite"}
    horizons = {name.split("/")[1]: (task.horizon, task.hold) for name, task in robosuite.items()}
    assert horizons == {"Lift": (150, 5), "Stack": (300, 1), "PickPlaceCan": (300, 1)}
    for name, task in robosuite.items():
        assert task.name == name and task.instruction and task.reference_frame == "world"
    tasks().clear()
    assert tasks(), "the table itself must not be handed out"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("robosuite/Lfit", "did you mean 'robosuite/Lift'"),
        ("Lift", "did you mean 'robosuite/Lift'"),
        ("robosuite/pickplacecan", "did you mean 'robosuite/PickPlaceCan'"),
        ("robosuit/Stack", "did you mean 'robosuite/Stack'"),
        ("qqqqqq", r"known suites: robosuite \(robosuite/Lift, ...\), metaworld"),
        ("robosuite/qqqqqq", "robosuite has: robosuite/Lift, robosuite/Stack"),
        ("pick-place-v2", "did you mean 'metaworld/pick-place-v3'"),
        ("libero/libero_spatial/12", "did you mean 'libero/libero_spatial/"),
    ],
)
def test_unknown_names_are_answered_with_close_ones(name, hint):
    with pytest.raises(ValueError, match=hint):
        make(name)
    with pytest.raises(ValueError, match=hint):
        find_task(name)


@needs_gymnasium
@pytest.mark.parametrize(
    "options, message",
    [
        ({"plcement": 1}, "unknown option 'plcement' of robosuite/Lift; did you mean 'placement'"),
        ({"qqqq": 1}, "unknown option 'qqqq' .*it takes: placement, state_keys, render_cameras, model_seed"),
        ({"task": "Lift"}, "unknown option 'task'"),
        ({"cameras": "agentview"}, r"cameras='agentview', wanted a list of names, e.g. \['agentview'\]"),
        ({"cameras": 3}, "cameras=3, wanted a list of names"),
        ({"state_keys": "robot0_eef_pos"}, "state_keys='robot0_eef_pos', wanted a list"),
        ({"placement": "wide"}, "placement='wide', wanted a number"),
        ({"placement": True}, "placement=True, wanted a number"),
        ({"placement": [0.1]}, r"placement=\[0.1\], wanted a number"),
        ({"placement": "5e-1"}, r"placement 0.5, wanted a half width in \(0, 0.3\]"),
        ({"placement": float("nan")}, "placement=nan, wanted a number"),
        ({"size": 84.5}, "size=84.5, wanted a whole number"),
        ({"size": "0"}, "size of 0, wanted at least 1"),
        ({"seed": "x"}, "seed='x', wanted a whole number"),
        ({"render_cameras": "no"}, "render_cameras='no', wanted true or false"),
    ],
)
def test_wrong_options_are_named_before_any_simulator(monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ValueError, match=message):
        make("robosuite/Lift", **options)


@needs_robosuite
@pytest.mark.parametrize("ending", ["", pytest.param("; env.close()", marks=pytest.mark.long)])
def test_numbers_come_as_text_and_the_end_of_the_interpreter_prints_nothing(ending):
    # Kept by older modules, both outlive what the environment's own module imported.
    code = (
        "import os, sys; from vilma.envs import make, robosuite; "
        "env = make('robosuite/Lift', placement='1e-1', size='32'); env.reset();"
        "print(env.simulator.placement_initializer.x_range, env.size); os.kept, sys.kept = env, robosuite"
    )
    result = run(code + ending)
    assert result.stdout.strip() == "[-0.1, 0.1] 32" and result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr, result.stderr


def test_import_pulls_no_simulator_and_no_torch():
    heavy = ("torch", "mujoco", "robosuite", "gymnasium")
    result = run(f"import sys, vilma.envs; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@needs_gymnasium
def test_a_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ImportError, match=r"vilma\[robot\]"):
        make("robosuite/Lift")


def test_a_missing_gymnasium_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "vilma.envs.robosuite", raising=False)
    monkeypatch.delattr(vilma.envs, "robosuite", raising=False)
    with pytest.raises(ImportError, match=r"vilma\[robot\]"):
        make("robosuite/Lift")


@needs_robosuite
@pytest.mark.parametrize("backend, library", [("osmesa", "libOSMesa.so"), ("egl", "libEGL.so")])
def test_without_opengl_the_error_names_the_packages(tmp_path, backend, library):
    # An empty file in front of the real library is to the loader what a missing one is.
    for name in (library, f"{library}.1", f"{library}.6", f"{library}.8"):
        (tmp_path / name).touch()
    code = "from vilma.envs import make; make('robosuite/Lift')"
    result = run(code, MUJOCO_GL=backend, LD_LIBRARY_PATH=str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the simulator cannot load OpenGL"), result.stderr
    assert f"MUJOCO_GL={backend}" in last
    assert "apt-get install libosmesa6 libgl1 libegl1" in last


@needs_robosuite
def test_a_wrong_backend_name_is_an_error_of_the_caller():
    result = run("from vilma.envs import make; make('robosuite/Lift')", MUJOCO_GL="bogus")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "bogus" in last and "osmesa" in last, result.stderr

"""The rules of the house: who may import whom, one name a file, bare folders, a wheel that works."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("vil", "pointmap", "policies", "datasets", "configs", "tools")
BARE = ("datasets", "configs", "tools", "tests")
NOT_ROOMS = ("vilma", "tests", "docs", "runs", "data", "build", "dist")
TRUNK_FREE = {"vilma.config", "vilma.extras"}

# unit -> units of ours that it may import (besides itself). tools and tests may import everything.
MAY_IMPORT = {
    "vilma.xlstm": set(),
    "vilma.envs": {"vilma.pointmap"} | TRUNK_FREE,
    "vilma.training": TRUNK_FREE,
    "vilma.evaluation": {"vilma.rollout", "vilma.workers"} | TRUNK_FREE,
    "vilma.rollout": {"vilma.evaluation", "vilma.workers"} | TRUNK_FREE,
    "vilma.chains": {"vilma.evaluation", "vilma.chain_rollout", "vilma.workers"} | TRUNK_FREE,
    "vilma.chain_rollout": {"vilma.rollout"} | TRUNK_FREE,
    "vilma.workers": TRUNK_FREE,
    "vilma.serving": TRUNK_FREE,
    "vilma.summaries": TRUNK_FREE,
    "vilma.report": {"vilma.report_tables"} | TRUNK_FREE,
    "vilma.report_tables": {"vilma.summaries"},
    "vilma.bench": TRUNK_FREE,
    "vilma.targets": set(),
    "vilma.config": {"vilma"},
    "vilma.extras": set(),
    "vilma.cli": {"vilma"},
    "vilma.testing": set(),
    "vilma": set(),
    "vilma.vil": {"vilma.xlstm"} | TRUNK_FREE,
    "vilma.pointmap": {"vilma.vil"} | TRUNK_FREE,
    "vilma.policies": {"vilma.xlstm", "vilma.vil", "vilma.pointmap"} | TRUNK_FREE,
    "vilma.datasets": {"vilma.pointmap"} | TRUNK_FREE,
}
XLSTM_PACKAGES = {"torch", "triton"}
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def git_files(*options: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def our_python() -> list[Path]:
    """Files that are tracked or about to be."""
    return git_files("-co", "--exclude-standard", "*.py")


def unit_of(file: Path) -> str:
    """The row of the table that a file belongs to."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ROOMS:
        return f"vilma.{parts[0]}"
    if parts[0] == "vilma" and len(parts) > 1 and parts[1] != "__init__":
        return f"vilma.{parts[1]}"
    return parts[0]


def imports_of(file: Path) -> list[str]:
    """Every module that a file imports, by its absolute name, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(file, node.level, node.module)
            if module == "vilma":
                names += [f"vilma.{alias.name}" for alias in node.names if alias.name != "__version__"]
            else:
                names.append(module)
    return names


def absolute(file: Path, level: int, module: str | None) -> str:
    """The module that ``from <level dots><module> import ...`` names in a file."""
    if level == 0:
        return module
    package = file.relative_to(ROOT).parent.parts
    if package[:1] and package[0] in ROOMS:
        package = ("vilma", *package)
    package = package[: len(package) - (level - 1)]
    return ".".join((*package, module) if module else package)


def test_relative_imports_are_resolved():
    trainer, house = ROOT / "vilma" / "training" / "trainer.py", ROOT / "vilma" / "training" / "__init__.py"
    assert absolute(trainer, 1, "optim") == absolute(house, 1, "optim") == "vilma.training.optim"
    assert absolute(trainer, 2, "xlstm.blocks") == "vilma.xlstm.blocks"
    assert absolute(trainer, 2, None) == "vilma" and absolute(trainer, 0, "torch") == "torch"
    assert absolute(ROOT / "policies" / "policy.py", 2, "datasets") == "vilma.datasets"
    assert absolute(ROOT / "policies" / "policy.py", 1, None) == "vilma.policies"


def unit_imported(module: str) -> str | None:
    """The row that an imported module belongs to; None for what is not ours."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("vilma", "tests") else None


def test_every_room_has_a_row():
    folders = {file.relative_to(ROOT).parts[0] for file in git_files() if file.parent != ROOT}
    folders = {name for name in folders if not name.startswith(".")}
    assert folders <= set(ROOMS) | set(NOT_ROOMS), "a new folder needs a place in the design"
    present = {f"vilma.{name}" for name in folders & set(ROOMS)}
    assert present - {"vilma.configs", "vilma.tools"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("unit", sorted(MAY_IMPORT))
def test_who_may_import_whom(unit):
    wrong = []
    for file in our_python():
        if unit_of(file) != unit:
            continue
        for module in imports_of(file):
            theirs = unit_imported(module)
            if theirs and theirs != unit and theirs not in MAY_IMPORT[unit]:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_tools_or_tests():
    wrong = []
    for file in our_python():
        if unit_of(file) in ("vilma.tools", "tests"):
            continue
        wrong += [
            f"{file.relative_to(ROOT)} imports {m}"
            for m in imports_of(file)
            if m.startswith(("vilma.tools", "tests"))
        ]
    # The command line finds its tools by file name, so it names the package in a string, not in an import.
    assert not wrong, "\n".join(wrong)


def test_kernel_layer_needs_torch_and_triton_only():
    standard = set(sys.stdlib_module_names)
    for file in our_python():
        if unit_of(file) == "vilma.xlstm":
            outside = {m.split(".")[0] for m in imports_of(file)} - standard - {"vilma"}
            assert outside <= XLSTM_PACKAGES, f"{file.relative_to(ROOT)} imports {outside - XLSTM_PACKAGES}"


def test_only_config_knows_the_config_library():
    for file in our_python():
        if file != ROOT / "vilma" / "config.py":
            found = {m for m in imports_of(file) if m.split(".")[0] in ("draccus", "yaml")}
            assert not found, f"{file.relative_to(ROOT)} imports {found}; use vilma.config"


def test_package_list_equals_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"vilma"}
    for package in ("xlstm", "envs", "training"):
        expected.add(f"vilma.{package}")
    for room in ROOMS:
        base = ROOT / room
        if base.is_dir():
            folders = [base] + [d for d in base.rglob("*") if d.is_dir() and d.name != "__pycache__"]
            expected |= {
                "vilma." + ".".join(d.relative_to(ROOT).parts)
                for d in folders
                if any(f.is_file() for f in d.iterdir())
            }
    assert set(settings["packages"]) == expected
    assert {k: v for k, v in settings["package-dir"].items() if k != "vilma"} == {
        f"vilma.{room}": room for room in ROOMS if (ROOT / room).is_dir()
    }


def test_bare_folders_have_no_init():
    assert not [f"{d}/__init__.py" for d in BARE if (ROOT / d / "__init__.py").exists()]


def test_no_catch_all_modules_and_no_long_files():
    for file in our_python():
        assert file.stem not in ("utils", "helpers", "common", "misc"), file
        lines = len(file.read_text().splitlines())
        assert lines <= 800, f"{file.relative_to(ROOT)} has {lines} lines; a file stops at 800"


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_datasets_of_hugging_face_wins_from_the_root():
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    code = "import datasets; print(datasets.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() not in ("", "None")
    assert not result.stdout.startswith(str(ROOT / "datasets"))


@pytest.mark.parametrize("room", ["vil", "pointmap", "policies"])
def test_a_room_imported_by_its_bare_name_says_so(room):
    if not (ROOT / room).is_dir():
        pytest.skip(f"{room}/ is not built yet")
    result = run_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}", ROOT)
    assert result.returncode != 0 and f"vilma.{room}" in result.stderr


def test_no_file_is_loaded_under_two_names():
    result = run_python("import vilma.vilma", ROOT)
    assert "ImportError" in result.stderr


def test_importing_vilma_is_light():
    heavy = "{'torch', 'numpy', 'timm'} & set(sys.modules)"
    code = f"import vilma, vilma.cli, vilma.config, sys; print(sorted({heavy}))"
    assert run_python(code, ROOT).stdout.strip() == "[]"


def test_lock_holds_pins_only():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!]+", line), f"not a bare pin: {line!r}"


@pytest.mark.long
def test_wheel_works_from_an_empty_folder(tmp_path):
    """Built from the tree, unpacked away from it, run where no checkout is near."""
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    for file in git_files("-co", "--exclude-standard"):
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True
    )
    (wheel,) = wheels.glob("vilma-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    backends = ["auto"]
    if (ROOT / "vilma" / "xlstm" / "mlstm_cpu.py").is_file() and COMPILER:
        backends.append("cpu")  # it is compiled from the wheel's own source
    code = f"""
import vilma, vilma.config, vilma.cli
assert vilma.__file__.startswith({str(site)!r}), vilma.__file__
assert len(vilma.__path__) == 1
import torch, vilma.pointmap, vilma.policies, vilma.envs, vilma.training
from vilma.xlstm import mlstm
x = torch.randn(1, 2, 5, 4); g = torch.randn(1, 2, 5)
for backend in {backends}:
    assert mlstm(x, x, x, g, g, backend=backend).shape == x.shape
assert vilma.config.find('configs/policies/demo_lift.yaml').is_file()
policy = vilma.policies.PointMapPolicy.from_config('configs/policies/demo_lift.yaml')
import datasets; assert not str(datasets.__file__).startswith({str(site)!r})
import vilma.datasets.robomimic
print(sorted(vilma.cli.commands()))
"""
    result = run_python(code, empty, PYTHONPATH=str(site), TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert result.returncode == 0, result.stderr
    assert "train-policy" in result.stdout

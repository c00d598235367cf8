"""vilma.config: overrides, unknown fields with close matches, round trips; every shipped YAML loads."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vilma import config

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}, wanted more than 0")


@dataclass(frozen=True)
class Run:
    optim: Optim = field(default_factory=Optim)
    crops: dict[str, tuple[int, ...]] = field(default_factory=dict)
    name: str | None = None
    steps: int = 10


def test_round_trip(tmp_path):
    run = Run(Optim(3e-4, (0.9, 0.999)), {"front": (1, 2, 3, 4)}, "a", 5)
    config.dump(run, tmp_path / "run.yaml")
    assert config.load(Run, tmp_path / "run.yaml") == run


def test_dotted_overrides():
    values = config.override(
        {"optim": {"lr": 1.0}}, ["--optim.lr", "3e-4", "--crops.front=[1, 2]", "--name", "x"]
    )
    run = config.decode(Run, values)
    assert run.optim.lr == 3e-4 and run.crops == {"front": (1, 2)} and run.name == "x"


def test_override_leaves_its_input_alone():
    values = {"optim": {"lr": 1.0}}
    config.override(values, ["--optim.lr", "2"])
    assert values == {"optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stepps": 3}, r"unknown field 'stepps' in Run; did you mean 'steps'"),
        ({"optim": {"learning": 3}}, r"unknown field 'learning' in Optim; it has: lr, betas"),
        ({"optim": {"lr": "fast"}}, r"optim.lr.*'fast'"),
        ({"optim": {"lr": -1}}, r"lr is -1.0, wanted more than 0"),
        ({"optim": 5}, r"^optim is 5, but 'optim' is a section; its fields are: lr, betas"),
        ({"optim": None}, r"^optim is None, but 'optim' is a section"),
        ({"optim": {"betas": "front"}}, r"optim.betas is the text 'front', wanted a list"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(config.ConfigError, match=message):
        config.decode(Run, values)


@pytest.mark.parametrize("arguments", [["lr", "3"], ["--steps"], ["--steps.x", "1"]])
def test_bad_overrides(arguments):
    with pytest.raises(config.ConfigError):
        config.override({"steps": 1}, arguments)


def test_missing_file_names_a_close_one(tmp_path):
    (tmp_path / "demo.yaml").write_text("steps: 1")
    with pytest.raises(config.ConfigError, match=r"close: .*demo\.yaml"):
        config.find(tmp_path / "dmo.yaml")


@pytest.mark.parametrize(
    "wrong", ["configs/policies/demo_lit.yaml", "demo_lit.yaml", "configs/demo_lift.yaml"]
)
def test_missing_shipped_files_have_close_ones_anywhere(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.ConfigError, match=r"close: configs/policies/demo_lift\.yaml") as caught:
        config.find(wrong)
    assert config.find(str(caught.value).split("close: ")[1].split(",")[0]).is_file()


def test_a_section_that_may_be_absent():
    @dataclass(frozen=True)
    class Outer:
        optim: Optim | None = None
        runs: list[Optim] = field(default_factory=list)

    assert config.decode(Outer, {"optim": None, "runs": []}) == Outer()
    with pytest.raises(config.ConfigError, match="'optim' is a section"):
        config.decode(Outer, {"optim": 3})


SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
READERS = {
    "policy": ("vilma.tools.train_policy", "RunConfig"),
    "model": ("vilma.tools._image_training", "ImageRunConfig"),
    "segmenter": ("vilma.tools.train_segmentation", "SegmentationRunConfig"),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads(path):
    values = config.read(path)
    kinds = [reader for section, reader in READERS.items() if section in values]
    assert len(kinds) == 1, f"{path} belongs to no known command"
    module, name = kinds[0]
    config.load(getattr(importlib.import_module(module), name), path)
    assert path.read_text().startswith("#"), "a config opens with the command that uses it"

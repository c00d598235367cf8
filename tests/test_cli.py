"""The ``vilma`` command: how it names tools, and what it says when one ends in an error."""

import types

import pytest

from vilma import cli
from vilma.config import ConfigError
from vilma.evaluation import EvaluationError
from vilma.training.checkpoint import CheckpointError
from vilma.training.diagnosis import NonFiniteError


class DeviceOutOfMemory(RuntimeError):
    """Stands for torch's class, which is known by its name."""


DeviceOutOfMemory.__name__ = "OutOfMemoryError"


class OwnError(RuntimeError):
    """As vilma's modules define them."""


OwnError.__module__ = "vilma.envs.somewhere"


@pytest.fixture
def ends_with(monkeypatch):
    """Makes ``vilma report`` end with an exception, in its main or while it is imported."""

    def install(error: BaseException, importing: bool = False) -> int:
        def fail(*_):
            raise error

        tool = fail if importing else lambda name: types.SimpleNamespace(main=fail)
        monkeypatch.setattr(cli.importlib, "import_module", tool)
        return cli.main(["report", "somewhere"])

    return install


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("got 1, wanted 2"), "got 1, wanted 2"),
        (ConfigError("no config file"), "no config file"),
        (FileNotFoundError("no run directory x"), "no run directory x"),
        (NonFiniteError("the loss is nan at step 3"), "the loss is nan at step 3"),
        (CheckpointError("the disk is full"), "the disk is full"),
        (EvaluationError("the simulator crashed 3 times"), "the simulator crashed 3 times"),
        (OwnError("camera 'front' returned garbage"), "camera 'front' returned garbage"),
        (
            MemoryError("the pixels take 9 GB; set cache: none"),
            "out of memory: the pixels take 9 GB; set cache: none",
        ),
        (MemoryError(), "out of memory; take a smaller batch, or less data"),
        (DeviceOutOfMemory("tried to allocate 9 GiB"), "out of memory: tried to allocate 9 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out of memory: DefaultCPUAllocator: can't",
        ),
    ],
)
def test_errors_for_the_user_are_one_line(ends_with, capsys, error, line):
    assert ends_with(error) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"vilma report: {line}") and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), KeyError("x"), AttributeError("y"), TypeError("z")]
)
def test_unexpected_errors_keep_their_traceback(ends_with, error):
    with pytest.raises(type(error)):
        ends_with(error)


def test_render_errors_count_as_our_own(ends_with, capsys):
    module = pytest.importorskip("vilma.envs.robosuite", exc_type=ImportError)
    assert ends_with(module.RenderError("camera 'front' returned garbage")) == 1
    assert capsys.readouterr().err == "vilma report: camera 'front' returned garbage\n"


def test_a_missing_package_at_import_is_one_line(ends_with, capsys):
    assert ends_with(ImportError("install it with: pip install 'vilma[robot]'"), importing=True) == 1
    assert "vilma report: install it with" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(ends_with, capsys):
    assert ends_with(KeyboardInterrupt()) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_commands_are_listed_and_close_ones_named(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    for name in cli.commands():
        assert name in listed
    assert cli.main(["train-polcy"]) == 2
    assert "did you mean 'train-policy'?" in capsys.readouterr().err

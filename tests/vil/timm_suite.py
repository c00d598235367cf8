"""timm's own model tests for every ``vil*`` model: ``python tests/vil/timm_suite.py [pytest arguments]``.

They come from the source distribution of the installed timm, fetched once with pip and kept in the cache. As
a plugin of pytest this module registers the family, has timm list only it, and feeds the two tests that load
weights with files of the published format (random values), so that no weights are downloaded.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MODULE = "vision_lstm"  # what timm calls the file of the family


def main(arguments: list[str]) -> int:
    folder = source()
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment.pop("GITHUB_ACTIONS", None)  # with it timm leaves tests out
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite", "-q", "-W", "ignore", "--no-header"]
    command += ["--durations=5", "tests/test_models.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment).returncode


def source() -> Path:
    """The folder that holds timm's tests/test_models.py of the installed version."""
    version = importlib.metadata.version("timm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vilma"
    folder = cache / f"timm-{version}"
    if (folder / "tests" / "test_models.py").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-binary", "timm", "--dest", scratch, f"timm=={version}"]
        if subprocess.run(pip).returncode:
            raise SystemExit(
                f"the source distribution of timm {version} could not be fetched; timm's tests need it"
            )
        (archive,) = Path(scratch).glob("timm-*.tar.gz")
        with tarfile.open(archive) as file:
            wanted = [
                m for m in file.getmembers() if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])
            ]
            file.extractall(scratch, members=wanted, filter="data")
        try:
            (Path(scratch) / f"timm-{version}").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def pytest_configure(config) -> None:
    import timm
    import torch
    from official import published_checkpoint
    from timm.models import _builder

    import vilma.vil  # noqa: F401 - registers the family

    torch.set_num_threads(1)
    listed = timm.list_models

    def list_models(*arguments, **options) -> list[str]:
        if options.get("module"):
            options["module"] = [*options["module"], MODULE]
        return [name for name in listed(*arguments, **options) if name.startswith("vil")]

    timm.list_models = timm.models.list_models = list_models
    _builder.load_state_dict_from_url = lambda url, **_: published_checkpoint(url)
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not needed here")


def pytest_collection_modifyitems(config, items) -> None:
    """Tests of models that timm names one by one are left out."""
    ours = [i for i in items if getattr(i, "callspec", None) and _model(i).startswith("vil")]
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours


def _model(item) -> str:
    name = item.callspec.params.get("model_name", "")
    return name if isinstance(name, str) else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

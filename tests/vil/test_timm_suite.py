"""timm's own model tests, for one name of each generation; `make test-timm` runs them for all."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("timm_suite.py")


@pytest.mark.long
@pytest.mark.parametrize("names", ["vil2_tiny_patch16_224", "vil_tiny_patch16_224"])
def test_timm_tests_pass(names):
    result = subprocess.run([sys.executable, str(SUITE), "-k", names], capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    passed, left_out = last.split(" passed")[0].split()[-1], last.split(" deselected")[0].split()[-1]
    assert int(passed) == 16 and int(left_out) > 200 and "skipped" not in last, last


def test_only_our_models_are_tested(monkeypatch):
    """The plugin has timm list what is ours, also where it picks models by the file that holds them."""
    spec = importlib.util.spec_from_file_location("timm_suite", SUITE)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    import timm
    from timm.models import _builder

    for owner in (timm, timm.models):
        monkeypatch.setattr(owner, "list_models", timm.list_models)
    monkeypatch.setattr(_builder, "load_state_dict_from_url", None)
    monkeypatch.syspath_prepend(SUITE.parent)

    class Config:
        def addinivalue_line(self, *_):
            pass

    suite.pytest_configure(Config())
    assert len(timm.list_models()) == len(timm.list_models(module=["beit"])) == 11
    assert timm.list_models("vit_*") == []
    (url,) = {timm.models.get_pretrained_cfg("vil2_tiny_patch16_224").url}
    checkpoint = _builder.load_state_dict_from_url(url)
    assert "xlstm.blocks.23.xlstm.proj_up.weight" in checkpoint["state_dict"]

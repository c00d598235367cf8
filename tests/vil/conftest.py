"""Official checkpoint names (official.py), importable by their own name."""

import importlib.util
import sys
from pathlib import Path

import pytest

OFFICIAL = Path(__file__).with_name("official.py")


@pytest.fixture(scope="session")
def official():
    if "official" not in sys.modules:
        spec = importlib.util.spec_from_file_location("official", OFFICIAL)
        sys.modules["official"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["official"])
    return sys.modules["official"]

"""Optional packages: imported where they are used, with a message that names what to install."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an ImportError that names the extra of vilma that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed; "
            f"install it with: pip install 'vilma[{extra}]'"
        ) from error


def require_timm() -> ModuleType:
    """Import timm, turning torchvision's failure beside a CPU-only torch into a clear error."""
    import torch

    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise ImportError(
            "torchvision's compiled operators cannot load: this torch is a CPU-only build "
            f"({torch.__version__}) and torchvision is built for CUDA torch. Install the pinned set "
            "(requirements.lock; it also runs on machines without a GPU) or a matching CPU pair of torch "
            "and torchvision."
        ) from error

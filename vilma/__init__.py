"""vilma: recurrent (xLSTM) backbones for vision and robot action.

The only import root. It imports no torch by itself: rooms and kernels load when they are named,
e.g. ``from vilma.xlstm import mlstm`` or ``import vilma.pointmap``.
"""

from pathlib import Path as _Path

if __name__ != "vilma":
    raise ImportError(
        f"vilma was imported as {__name__!r}; import it as 'vilma' so that no file has two names"
    )

__version__ = "0.1.0"

# In a checkout the rooms (vil/, pointmap/, policies/, ...) lie beside this folder; in a wheel, inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "tools").is_dir():
    __path__.append(str(_root))

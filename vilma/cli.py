"""``vilma <command>``: finds the tools, prints their one-line help, runs one of them."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

import vilma


def commands() -> dict[str, Path]:
    """Command name -> file, for every tool: ``tools/bench_mlstm.py`` is ``bench-mlstm``."""
    files = (f for root in vilma.__path__ for f in sorted(Path(root, "tools").glob("*.py")))
    return {f.stem.replace("_", "-"): f for f in files if not f.stem.startswith("_")}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    found = commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"vilma {vilma.__version__}\n\nusage: vilma <command> [options]     (vilma <command> --help)\n")
        for name, file in sorted(found.items()):
            print(f"  {name:<20} {_one_line(file)}")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(vilma.__version__)
        return 0
    name, *rest = arguments
    if name not in found:
        near = difflib.get_close_matches(name, found)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(sorted(found))}"
        print(f"vilma: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"vilma.tools.{found[name].stem}").main(rest) or 0
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"vilma {name}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vilma {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _message(error: Exception) -> str | None:
    """What an error says to the user; None for one that only a traceback explains.

    Told are errors of what was given (values, files, packages), memory that ran out, and the classes that
    vilma itself defines.
    """
    text = str(error)
    # torch has classes and texts of its own for a device or an allocator without memory.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
    ):
        return f"out of memory: {text}" if text else "out of memory; take a smaller batch, or less data"
    own = type(error).__module__.split(".")[0] == "vilma"
    return text if own or isinstance(error, (ValueError, OSError, ImportError)) else None


def _one_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n", 1)[0]


if __name__ == "__main__":
    raise SystemExit(main())

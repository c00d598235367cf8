"""C++ with a plain C interface, compiled when it is first used and called through ctypes.

Building takes seconds, and the result fits every version of torch. It is kept where torch keeps its
extensions (``TORCH_EXTENSIONS_DIR``, or ``torch_extensions`` in the cache) under a name made of the sources,
the flags and the processor. Every function takes one array of 64-bit integers and the address of OpenMP's
GOMP_parallel.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14


class BuildError(RuntimeError):
    """A compiled backend cannot be had; the message says why and what to do."""


class Extension:
    """A C++ file, the headers that it includes, and the functions ``<prefix><name>`` that it has.

    Args:
        name: what a warning calls it, as in "the mLSTM".
    """

    def __init__(
        self, name: str, source: Path, headers: Sequence[Path], prefix: str, functions: Sequence[str]
    ):
        self.name = name
        self._source, self._headers = source, headers
        self._prefix, self._functions = prefix, functions
        self._loaded: ctypes.CDLL | BuildError | None = None
        self._warned = False

    def library(self) -> ctypes.CDLL:
        """The compiled functions; builds them when nobody has yet. Raises `BuildError`."""
        if self._loaded is None:
            try:
                self._loaded = self._load()
            except BuildError as error:
                self._loaded = error
        if isinstance(self._loaded, BuildError):
            raise self._loaded
        return self._loaded

    def is_available(self) -> bool:
        """Whether the compiled functions can be had; warns once when not."""
        try:
            self.library()
        except BuildError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self.name} runs its slower eager path on this CPU: {error}", stacklevel=3)
            return False
        return True

    def call(self, function: str, arguments: Sequence[int]) -> None:
        """Tensors of the arguments are held by the caller until this returns."""
        run = getattr(self.library(), f"{self._prefix}{function}")
        if run(struct.pack(f"{len(arguments)}q", *arguments), _parallel()):
            raise MemoryError(f"no memory for the work space of {self.name} ({function})")

    def _load(self) -> ctypes.CDLL:
        try:
            path = _cache_folder() / f"{self._source.stem}_{self._fingerprint()}.so"
            if not path.exists():
                with _lock(path.with_suffix(".lock")):
                    if not path.exists():
                        _build(self._source, path)
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"{self._source.name} cannot be built or loaded: {error}; set TORCH_EXTENSIONS_DIR to "
                "a folder where files can be written and executed, and start again"
            ) from error
        for name in self._functions:
            function = getattr(loaded, f"{self._prefix}{name}")
            function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_int
        return loaded

    def _fingerprint(self) -> str:
        sources = [path.read_text() for path in (self._source, *self._headers)]
        parts = (*sources, " ".join(FLAGS), os.environ.get("CXX", ""), _processor())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def address(x: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def bits_of(x: float) -> int:
    """The bits of a double."""
    return struct.unpack("q", struct.pack("d", x))[0]


def contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def in_large_pages(x: Tensor) -> Tensor:
    """x, not yet written, in pages of 2 MB where the system has them.

    The first touch of each page of 4 KB costs up to microseconds, of a large tensor as much as its content.
    """
    size = x.numel() * x.element_size()
    advise = _madvise()
    if advise and size >= 2 * _LARGE_PAGE:
        begin = -(-x.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        end = (x.data_ptr() + size) // _LARGE_PAGE * _LARGE_PAGE
        advise(begin, end - begin, _MADV_HUGEPAGE)  # only advice: whether it is taken is no concern of ours
    return x


@functools.cache
def _madvise():
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return advise


def _build(source: Path, path: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise BuildError(
            f"no C++ compiler found on PATH (looked for {', '.join(_COMPILERS)}); install g++ "
            "(apt install g++, or conda install gxx) or name one in CXX, and start again"
        )
    try:
        words = shlex.split(compiler)
    except ValueError:  # a quote that is not closed
        words = []
    unusable = BuildError(
        f"CXX={compiler!r} is no compiler that can be run; name one in CXX or unset it, install g++ "
        "(apt install g++, or conda install gxx), and start again"
    )
    if not words or shutil.which(words[0]) is None:
        raise unusable
    failures = []
    for native in (("-march=native",), ()):
        # built beside its place and moved there in one step: nobody ever loads half a file
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        command = [*words, *FLAGS, *native, "-o", str(unfinished), str(source)]
        try:
            try:
                result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            except OSError as error:
                raise unusable from error
            if result.returncode == 0 and unfinished.exists():
                os.replace(unfinished, path)
                return
            said = result.stderr.strip()[-1500:] or f"exit status {result.returncode}, no file, no message"
            failures.append((command, said))
        finally:
            unfinished.unlink(missing_ok=True)
    command, said = failures[0]
    raise BuildError(
        f"{shlex.join(command)} failed; a g++ of version 12 or newer is known to work: install it "
        f"(apt install g++, or conda install gxx), name it in CXX, and start again:\n{said}"
    )


def _cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "torch_extensions"
    folder = Path(root) / "vilma"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    # private and new, for this process only: a fixed name in a shared folder could hold anything
    return Path(tempfile.mkdtemp(prefix="vilma-"))


def _processor() -> str:
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        processor += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return processor


class _lock:
    """One process builds while the others wait; where files cannot be locked each builds for itself."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = open(self.path, "w")
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass

    def __exit__(self, *_):
        self.file.close()


@functools.cache
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None

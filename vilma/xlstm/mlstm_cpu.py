"""The `cpu` backend of the mLSTM: mlstm_cpu.cpp, compiled when it is first used, and how it is called.

The source has a plain C interface: building it takes seconds, and the result fits every version of torch. It
is kept where torch keeps its extensions (``TORCH_EXTENSIONS_DIR``, or ``torch_extensions`` in the cache)
under a name made of the source, the flags and the processor. float16 is converted as a whole, float32 and
bfloat16 are read in place, with any strides.

Shapes: B batch, H heads, T steps, Dk and Dv head sizes.
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
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .mlstm_chunkwise import Form, Saved, chunk_of, dense_like, saved_shapes

SOURCE = Path(__file__).with_name("mlstm_cpu.cpp")
HEADER = SOURCE.with_name("mlstm_cpu_tiles.h")
SAVES_H = False
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK = 64  # rows for which the gate matrix is formed at once
_SERIAL = 1 << 20  # multiplications below which threads cost more than they give


class BuildError(RuntimeError):
    """The compiled backend cannot be had; the message says why and what to do."""


@functools.cache
def _loaded() -> ctypes.CDLL | BuildError:
    try:
        return _load()
    except BuildError as error:
        return error


def library() -> ctypes.CDLL:
    """The compiled functions; builds them when nobody has yet. Raises `BuildError`."""
    loaded = _loaded()
    if isinstance(loaded, BuildError):
        raise loaded
    return loaded


@functools.cache
def is_available() -> bool:
    """Whether the compiled functions can be had; warns once when not."""
    loaded = _loaded()
    if isinstance(loaded, BuildError):
        warnings.warn(f"the mLSTM runs its slower eager path on this CPU: {loaded}", stacklevel=3)
        return False
    return True


def _load() -> ctypes.CDLL:
    try:
        folder = _cache_folder()
        path = folder / f"mlstm_cpu_{_fingerprint()}.so"
        if not path.exists():
            with _lock(path.with_suffix(".lock")):
                if not path.exists():
                    _build(path)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"mlstm_cpu.cpp cannot be built or loaded: {error}") from error
    for name in ("forward", "backward", "step"):
        function = getattr(loaded, f"vilma_mlstm_{name}")
        function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_int
    return loaded


def _build(path: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise BuildError(
            f"no C++ compiler found on PATH (looked for {', '.join(_COMPILERS)}); install g++ "
            "(apt install g++, or conda install gxx) or name one in CXX, and start again"
        )
    errors = []
    for native in (("-march=native",), ()):
        # built beside its place and moved there in one step: nobody ever loads half a file
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        command = [*shlex.split(compiler), *FLAGS, *native, "-o", str(unfinished), str(SOURCE)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                os.replace(unfinished, path)
                return
            errors.append(result.stderr.strip()[-1500:])
        finally:
            unfinished.unlink(missing_ok=True)
    raise BuildError(
        f"{shlex.join(command)} failed; a g++ of version 12 or newer is known to work:\n{errors[0]}"
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
    # private and new, for this process only: a fixed name in a shared folder could hold anything
    return Path(tempfile.mkdtemp(prefix="vilma-"))


def _fingerprint() -> str:
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        processor += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    parts = (SOURCE.read_text(), HEADER.read_text(), " ".join(FLAGS), os.environ.get("CXX", ""), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, tuple, Saved]:
    """As `vilma.xlstm.mlstm_chunkwise.forward`; i, f and the state float32."""
    if q.dtype not in _DTYPES:
        single = (x.float() for x in (q, k, v))
        h, *rest = forward(*single, i, f, state, starts, form, return_state, save)
        return h.to(q.dtype), *rest
    state = _contiguous(state)
    h, (c, n, m) = dense_like(v), (None, None, None)
    batch, heads, _, dim_qk = q.shape
    if return_state:
        c, n = i.new_empty(batch, heads, dim_qk, v.shape[-1]), i.new_empty(batch, heads, dim_qk)
        m = i.new_empty(batch, heads) if form.exponential else None
    saved = Saved()
    if save:
        saved = Saved(
            *(None if shape is None else i.new_empty(shape) for shape in saved_shapes(q, v, starts, form))
        )
    arguments = _problem(q, k, v, i, f, state, starts, form, saved)
    _call("forward", (*arguments, *_layout(h), *map(_address, (c, n, m))))
    return h, (c, n, m), saved


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor | None,
    last: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    form: Form,
) -> tuple[Tensor | None, ...]:
    """As `vilma.xlstm.mlstm_chunkwise.backward`."""
    if q.dtype not in _DTYPES:
        single = (x.float() for x in (q, k, v))
        dq, dk, dv, *rest = backward(grads, *single, i, f, state, starts, h, last, saved, form)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), *rest
    state = _contiguous(state)
    dh = None if grads[0] is None else grads[0].to(q.dtype)
    d_last = _contiguous(None if x is None else x.float() for x in grads[1:])
    dq, dk, dv = dense_like(q), dense_like(k), dense_like(v)
    di, df = (x.new_empty(x.shape) for x in (i, f))
    d_state = [None if x is None else x.new_empty(x.shape) for x in state]
    arguments = _problem(q, k, v, i, f, state, starts, form, saved)
    for x in (dh, dq, dk, dv):
        arguments += _layout(x)
    _call("backward", (*arguments, *map(_address, (*last[:2], *d_last, di, df, *d_state))))
    return dq, dk, dv, di, df, *d_state


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """One step: q, k (B, H, Dk), v (B, H, Dv), i, f (B, H) -> h in q's dtype and the next state."""
    dtype = q.dtype
    if dtype not in _DTYPES:
        q, k, v = q.float(), k.float(), v.float()
    c0, n0, m0 = _contiguous(state)
    batch, heads, dim_qk = q.shape
    dim_v = v.shape[-1]
    h = v.new_empty(batch, heads, dim_v)
    c, n = i.new_empty(batch, heads, dim_qk, dim_v), i.new_empty(batch, heads, dim_qk)
    m = i.new_empty(batch, heads) if form.exponential else None
    threads = torch.get_num_threads() if c.numel() >= _SERIAL else 1
    arguments = [batch, heads, 1, dim_qk, dim_v, 1, 1, form.exponential, form.normalize, False]
    arguments += (q.dtype == torch.bfloat16, threads, *_double(form.eps))
    for x in (q, k, v, i, f):
        size, (b, h_, *d) = x.element_size(), x.stride()
        arguments += (x.data_ptr(), b * size, h_ * size, 0, d[0] * size if d else 0)
    arguments += (*_layout(None), *map(_address, (c0, n0, m0)), 0, 0, 0, 0)
    size = h.element_size()
    arguments += (h.data_ptr(), heads * dim_v * size, dim_v * size, 0, size, *map(_address, (c, n, m)))
    _call("step", arguments)
    return h.to(dtype), (c, n, m)


def _call(name: str, arguments: Sequence[int]) -> None:
    """Tensors of the arguments are held by the caller until this returns."""
    if _function(name)(struct.pack(f"{len(arguments)}q", *arguments), _parallel()):
        raise MemoryError(f"no memory for the work space of the mLSTM ({name})")


@functools.cache
def _function(name: str):
    return getattr(library(), f"vilma_mlstm_{name}")


def _double(x: float) -> tuple[int]:
    """The bits of x."""
    return struct.unpack("q", struct.pack("d", x))


def _problem(q, k, v, i, f, state, starts, form: Form, saved) -> list[int]:
    """The arguments that `Problem` reads, in its order."""
    batch, heads, steps, dim_qk = q.shape
    dim_v = v.shape[-1]
    chunk = chunk_of(steps, dim_qk, dim_v, form.chunk_size)
    products = batch * heads * steps * (chunk * (dim_qk + dim_v) // 2 + dim_qk * dim_v)
    threads = torch.get_num_threads() if products >= _SERIAL else 1
    arguments = [batch, heads, steps, dim_qk, dim_v, chunk, _BLOCK]
    arguments += (form.exponential, form.normalize, form.reverse, q.dtype == torch.bfloat16, threads)
    arguments += _double(form.eps)
    for x in (q, k, v, i, f):
        arguments += _layout(x)
    arguments += _layout(None if starts is None else starts[:, None])
    arguments += map(_address, (*state, *saved))
    return arguments


def _layout(x: Tensor | None) -> tuple[int, ...]:
    """Address and strides in bytes of (B, H, T, D) or (B, H, T)."""
    if x is None:
        return (0,) * 5
    size = x.element_size()
    strides = [s * size for s in x.stride()]
    return (x.data_ptr(), *strides) if len(strides) == 4 else (x.data_ptr(), *strides, 0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _contiguous(tensors) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]

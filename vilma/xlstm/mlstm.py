"""The mLSTM as a function of tensors: arguments, checks and the choice of a backend.

Shapes: B batch, H heads, T steps, Dk and Dv head sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import _register_namedtuple

from .mlstm_chunkwise import no_autocast
from .mlstm_naive import mlstm_recurrent_naive, mlstm_step_naive, sequence_starts
from .operators import backend_for

GATES = ("exp", "sigmoid")
BACKENDS = ("auto", "triton", "cpu", "torch", "naive")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MLSTMState(NamedTuple):
    """What an mLSTM remembers: c (B, H, Dk, Dv), n (B, H, Dk), m (B, H).

    c and n are in units of exp(m), the exponential gate's stabiliser: the memory itself is ``c * exp(m)``.
    The sigmoid gate has no stabiliser, its m is None. n may be given as None where h is not normalised.
    """

    c: Tensor
    n: Tensor | None
    m: Tensor | None


# exported programs that take or return a state can then be saved and loaded
_register_namedtuple(MLSTMState, serialized_type_name="vilma.xlstm.MLSTMState")
torch.serialization.add_safe_globals([MLSTMState])


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | None = None,
    *,
    gate: str = "exp",
    normalize: bool | None = None,
    reverse: bool = False,
    return_state: bool = False,
    reset: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Run an mLSTM over a sequence (xLSTM, arXiv 2405.04517, equations 19 to 27; TFLA, arXiv 2503.14376).

    ::

        C_t = F C_{t-1} + I k_t v_t^T,   n_t = F n_{t-1} + I k_t,   s_t = Dk^-1/2 q_t . n_t
        h_t = Dk^-1/2 C_t^T q_t / (max(|s_t|, exp(-m_t)) + eps)

    with F = sigmoid(f). ``gate="exp"`` has I = exp(i), with C and n kept in units of exp(m_t),
    m_t = max(log F + m_{t-1}, i); ``gate="sigmoid"`` has I = sigmoid(i) and m = 0.

    Args:
        q, k: queries and keys (B, H, T, Dk), any strides. The scale Dk^-1/2 is applied inside.
        v: values (B, H, T, Dv).
        i, f: gate pre-activations (B, H, T).
        state: state before the first step; zero (with m = 0) when None. It is converted to the dtype in which
            this call accumulates: float64 is rounded to float32 unless q or a gate has it.
        gate: ``exp`` or ``sigmoid``.
        normalize: divide by the normaliser; None means yes for ``exp``, no for ``sigmoid``. Not normalised, h
            is ``Dk^-1/2 q_t`` times the memory itself: ``C_t exp(m_t)`` for ``exp``, which may overflow.
        reverse: run the sequence from its end; h_t then depends on the steps t, ..., T - 1.
        return_state: also return the state after the last step that was run.
        reset: (B, T) bool, True where a new sequence begins inside a row: nothing passes between the steps
            before t and those from t on, and the state starts again from zero with m = 0. The mask means the
            same in both directions: each sequence of the row is run by itself, with ``reverse`` from its own
            end. Forward, ``reset[:, 0]`` drops ``state``; in reverse it has no effect.
        chunk_size: steps of one chunk; chosen by the backend when None. It moves no result beyond rounding.
        backend: ``triton`` (CUDA, ROCm), ``cpu`` (compiled when it is first used), ``torch`` or ``naive``;
            ``auto`` picks the first of them that runs here. float64 takes ``torch`` on a CPU in any case.
        eps: added to the normaliser.

    Returns:
        h (B, H, T, Dv) in q's dtype and, with ``return_state``, the last `MLSTMState`. Gates and states are
        accumulated in float32, or float64 where q or a gate has it. Every gradient is exact, the normaliser's
        and those of the first and last state included. Derivatives are reverse-mode and first: forward-mode
        and second ones only with ``backend="naive"``.

    Steps that are padding must hold finite numbers, whatever the gates make of them: inside a chunk they are
    multiplied by weights of zero, and a NaN or an infinity reaches the steps before it.

    Raises:
        ValueError: arguments that do not fit together.
        RuntimeError: a backend forced by name that cannot run here; forward-mode derivatives asked of a
            backend other than ``naive``.
    """
    normalize = _check_options(gate, normalize)
    _check_sequence(q, k, v, i, f)
    if reset is not None:
        _check_reset(reset, q)
    _check_chunk_size(chunk_size)
    _check_backend(backend)
    _check_eps(eps)
    acc = _accumulation_dtype(q, i, f)
    i, f = i.to(acc), f.to(acc)
    if state is not None:
        state = _check_state(state, q, v, gate, normalize, acc)
    if backend == "naive":
        given = state or _zero_state(q, v, gate, acc)
        with no_autocast(q):
            h, last = mlstm_recurrent_naive(
                q.to(acc), k.to(acc), v.to(acc), i, f, given, reset, gate, normalize, reverse, eps
            )
        h = h.to(q.dtype)
    else:
        given = state or (None, None, None)
        starts = None if reset is None else sequence_starts(reset, reverse)
        exponential = gate == "exp"
        _refuse_tangents(q, k, v, i, f, *given)
        # the shapes of what is kept depend on backend and length, which an exported program leaves open; a
        # traced one is checked against a second trace that is made without gradients
        recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
        save = _needs_grad(q, k, v, i, f, *given) and not recorded
        h, c, n, m, *_ = torch.ops.vilma.mlstm(
            q,
            k,
            v,
            i,
            f,
            *given,
            starts,
            exponential,
            normalize,
            reverse,
            chunk_size,
            eps,
            backend,
            return_state,
            save,
        )
        last = c, n, m if exponential else None
    return (h, MLSTMState(*last)) if return_state else h


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | None = None,
    *,
    gate: str = "exp",
    normalize: bool | None = None,
    backend: str = "auto",
    eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """One step of `mlstm`, O(1) in the length of the past.

    Args:
        q, k: (B, H, Dk); v (B, H, Dv); i, f (B, H) gate pre-activations.
        state: the state before this step; zero when None.
        gate, normalize, backend, eps: as in `mlstm`.

    Returns:
        h (B, H, Dv) in q's dtype and the next state (new tensors; the given state is not changed). Where a
        gradient is needed the step is taken with torch's own operators, whatever the backend.
    """
    normalize = _check_options(gate, normalize)
    _check_step(q, k, v, i, f)
    _check_backend(backend)
    _check_eps(eps)
    acc = _accumulation_dtype(q, i, f)
    i, f = i.to(acc), f.to(acc)
    if state is not None:
        state = _check_state(state, q, v, gate, normalize, acc)
    given = state or (None, None, None)
    if backend != "naive" and not _needs_grad(q, k, v, i, f, *given):
        _refuse_tangents(q, k, v, i, f, *given)
        exponential = gate == "exp"
        h, c, n, m = torch.ops.vilma.mlstm_step(q, k, v, i, f, *given, exponential, normalize, eps, backend)
        return h, MLSTMState(c, n, m if exponential else None)
    if not torch.compiler.is_compiling() and backend != "naive":
        backend_for(backend, q, v, i)  # raises where one that was forced cannot run
    given = state or _zero_state(q, v, gate, acc)
    with no_autocast(q):
        h, last = mlstm_step_naive(*(x.to(acc) for x in (q, k, v, i, f)), given, gate, normalize, eps)
    return h.to(q.dtype), MLSTMState(*last)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """The operators have no forward derivative, and torch would take it for zero."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("this mlstm backend has no forward-mode derivative; use backend='naive'")


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is None:
        return
    whole = isinstance(chunk_size, (int, torch.SymInt)) and not isinstance(chunk_size, bool)
    if not whole or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; pass a positive whole number of steps or None")


def _check_eps(eps: float) -> None:
    number = isinstance(eps, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(eps, bool)
    if not number or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; pass a number that is not negative (default 1e-6)")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; known backends: {', '.join(BACKENDS)}")


def _check_options(gate: str, normalize: bool | None) -> bool:
    if gate not in GATES:
        raise ValueError(f"gate={gate!r}; known gates: {', '.join(GATES)}")
    return gate == "exp" if normalize is None else bool(normalize)


def _check_sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> None:
    _check_tensors(q, k, v, i, f)
    shape = q.shape
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(shape)}; pass (B, H, T, Dk)")
    if 0 in shape:
        raise ValueError(f"q has shape {tuple(shape)}; every size must be at least 1")
    if k.shape != shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; pass q's shape {tuple(shape)} (B, H, T, Dk)")
    if v.dim() != 4 or v.shape[:3] != shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v has shape {tuple(v.shape)}; pass (B, H, T, Dv) = {(*shape[:3], 'Dv')}")
    _check_gates(i, f, shape[:3], "(B, H, T)")


def _check_step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> None:
    _check_tensors(q, k, v, i, f)
    shape = q.shape
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(shape)}; a step takes (B, H, Dk), a sequence goes to mlstm")
    if 0 in shape:
        raise ValueError(f"q has shape {tuple(shape)}; every size must be at least 1")
    if k.shape != shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; pass q's shape {tuple(shape)} (B, H, Dk)")
    if v.dim() != 3 or v.shape[:2] != shape[:2] or v.shape[2] == 0:
        raise ValueError(f"v has shape {tuple(v.shape)}; pass (B, H, Dv) = {(*shape[:2], 'Dv')}")
    _check_gates(i, f, shape[:2], "(B, H)")


def _check_gates(i: Tensor, f: Tensor, shape: tuple[int, ...], legend: str) -> None:
    for name, x in (("i", i), ("f", f)):
        if x.shape != shape:
            got, wanted = tuple(x.shape), tuple(shape)
            hint = f"; drop the last axis: {name}.squeeze(-1)" if got == (*wanted, 1) else ""
            raise ValueError(f"{name} has shape {got}; pass {legend} = {wanted}{hint}")


def _check_tensors(*tensors: Tensor) -> None:
    q = tensors[0]
    for name, x in zip("qkvif", tensors):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; pass a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; pass float64, float32, bfloat16 or float16 ({name}.float())"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} but q is on {q.device}; move all of them to one device"
            )
    for name, x in zip("kv", tensors[1:3]):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}; give q, k, v one dtype")


def _check_reset(reset: Tensor, q: Tensor) -> None:
    shape = (q.shape[0], q.shape[2])
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool or tuple(reset.shape) != shape:
        got = (
            f"{reset.dtype} {tuple(reset.shape)}"
            if isinstance(reset, Tensor)
            else f"a {type(reset).__name__}"
        )
        raise ValueError(f"reset is {got}; pass a torch.bool tensor (B, T) = {shape}")
    if reset.device != q.device:
        raise ValueError(f"reset is on {reset.device} but q is on {q.device}; move it there")


def _check_state(
    state: MLSTMState, q: Tensor, v: Tensor, gate: str, normalize: bool, acc: torch.dtype
) -> MLSTMState:
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"state is {type(state).__name__}; pass an MLSTMState(c, n, m) or None")
    c, n, m = state
    heads, dim_qk, dim_v = q.shape[:2], q.shape[-1], v.shape[-1]
    for name, x, shape in (("c", c, (*heads, dim_qk, dim_v)), ("n", n, (*heads, dim_qk)), ("m", m, heads)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.shape != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"state.{name} has shape {got}; pass {tuple(shape)}")
        if not x.is_floating_point():
            raise ValueError(f"state.{name} has dtype {x.dtype}; pass a floating-point tensor (best {acc})")
        if x.device != q.device:
            raise ValueError(f"state.{name} is on {x.device} but q is on {q.device}; move the state there")
    if c is None:
        raise ValueError("state.c is None; pass an MLSTMState with c, or state=None to start from zero")
    if n is None:
        if normalize:
            raise ValueError("state.n is None; the normalised form needs it (B, H, Dk)")
        n = torch.zeros(*heads, dim_qk, dtype=acc, device=q.device)
    if gate == "exp":
        if m is None:
            raise ValueError("state.m is None; gate='exp' needs it (a state of gate='sigmoid' has none)")
        m = m.to(acc)
    elif m is not None:
        raise ValueError("state.m is given, but gate='sigmoid' has no m: is this a state of gate='exp'?")
    return MLSTMState(c.to(acc), n.to(acc), m)


def _zero_state(q: Tensor, v: Tensor, gate: str, acc: torch.dtype) -> MLSTMState:
    batch, heads = q.shape[:2]
    c = torch.zeros(batch, heads, q.shape[-1], v.shape[-1], dtype=acc, device=q.device)
    m = torch.zeros(batch, heads, dtype=acc, device=q.device) if gate == "exp" else None
    return MLSTMState(c, torch.zeros_like(c[..., 0]), m)


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32

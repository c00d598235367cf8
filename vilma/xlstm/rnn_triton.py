"""The `triton` backend of the recurrent cells: buffers and launches around their kernels.

A head size whose r fits in the registers of one multiprocessor is one launch forward (`rnn_triton_kernels`),
a larger one takes r from the cache, in one launch or in one a step (`rnn_triton_tiled`; a CUDA graph takes
them all). Nothing is kept for the backward but h: it makes the gates and states again, walks back, and makes
the gradient of r in one product a gate. triton is imported when a kernel is launched, not with this module.

Batch, length, heads and strides are run-time numbers of every kernel: a new one compiles nothing.

Shapes: B batch, T steps, H heads, D head size, G gates of wx, S gates of r.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .mlstm_chunkwise import dense_like, no_autocast
from .mlstm_triton_launch import interpreting, launch, on_device, rowwise, strides
from .mlstm_triton_tiles import float32_precision, kind_of
from .rnn_torch import Form, Grads
from .rnn_triton_tiles import Plan, Tile, padded, plan_for

_IDS = {"slstm": 0, "lstm": 1, "gru": 2, "elman": 3}  # as in rnn_triton_cells
_PLANES = {"slstm": 6, "lstm": 5, "gru": 5, "elman": 1}


def supports(wx: Tensor) -> tuple[bool, str]:
    """Whether the kernels take tensors of this dtype, and if not, why."""
    if wx.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the Triton kernels compute in float32; {wx.dtype} needs backend='torch'"
    return True, ""


def forward(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """h (B, T, H, D) and the last state (as many None unless asked for); see `rnn_torch` for the arguments.

    ``plan`` replaces the table's.
    """
    call = _Call(wx, r, b, starts, form, plan)
    wx, count = call.wx, len(state)
    batch, steps, _, heads, dim = wx.shape
    h = wx.new_empty(batch, steps, heads, dim)
    given = _filled(state)
    last = [wx.new_empty(batch, heads, dim, dtype=torch.float32) for _ in state]
    tile = call.plan.forward
    with on_device(wx):
        if call.plan.form == "resident":
            from .rnn_triton_kernels import forward_resident

            launch(
                forward_resident,
                heads * -(-batch // tile.bb),
                *(
                    wx,
                    call.r,
                    call.b,
                    call.starts,
                    *given,
                    h,
                    *_four(last if return_state else (None,) * count),
                ),
                *call.sizes(wx),
                HAS_STATE=state[0] is not None,
                RETURN_STATE=return_state,
                STAGES=tile.stages,
                HOLD=tile.hold,
                BD=padded(dim),
                BB=tile.bb,
                tile=tile,
                **call.flags(wx),
            )
        else:
            read = wx.new_empty(2, batch, heads, dim)
            read[0] = 0.0 if state[0] is None else state[0]
            if state[0] is None:
                given = _four([torch.zeros_like(last[0])] * count)
            if call.plan.form == "whole":
                for x, x0 in zip(last, given):
                    x.copy_(x0)
                given = _four(last)
                _forward_tiled(call, wx, read, given, h, last, 0, tile, whole=True)
            else:
                for step_ in range(steps):
                    _forward_tiled(call, wx, read, given, h, last, step_, tile)
                    given = _four(last)
    return h, tuple(last) if return_state else (None,) * count


def backward(
    grads: Sequence[Tensor | None],
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor,
    last: Sequence[Tensor | None],
    form: Form,
    plan: Plan | None = None,
) -> Grads:
    """Gradients of wx, r, b and the first state; see `rnn_torch`. Of ``last``, what has one is needed."""
    call = _Call(wx, r, b, starts, form, plan)
    dwx = dense_like(wx)
    wx = call.wx
    batch, steps, _, heads, dim = wx.shape
    has_state = state[0] is not None
    initial = _filled(state)
    read = _read(h, state[0], starts, form.reverse)
    planes = wx.new_empty(batch, steps, heads, _PLANES[form.cell], dim, dtype=torch.float32)
    dh, dlast, moves = grads[0], list(grads[1:]), False
    if form.cell == "slstm":
        dlast[3] = _mu(dlast, last)
        moves = has_state or dlast[2] is not None or dlast[3] is not None
    dh = None if dh is None else dh.to(h.dtype).contiguous()
    dg = wx.new_empty(batch, steps, heads, dim) if form.cell == "gru" else None
    has_dlast = any(x is not None for x in dlast)
    # the gradients of the last state going in, those of the first one coming out
    new = {"dtype": torch.float32, "device": wx.device}
    empty = torch.zeros if has_dlast or call.plan.form != "resident" else torch.empty
    carried = [empty(batch, heads, dim, **new) if x is None else x.to(**new, copy=True) for x in dlast]
    shared = {
        "HAS_DH": dh is not None,
        "HAS_STATE": has_state,
        "MU": moves,
        "CLIP": form.grad_clip is not None,
    }
    clip = form.grad_clip or 0.0
    with on_device(wx), no_autocast(wx):
        _replay(call, wx, read, initial, has_state, planes)
        tile = call.plan.backward
        flags = call.flags(dwx, bias=False) | shared
        if call.plan.form == "resident":
            from .rnn_triton_kernels import backward_resident

            ends = _four(carried)
            launch(
                backward_resident,
                heads * -(-batch // tile.bb),
                *(planes, call.r, call.starts, dh, *ends, dwx, dg, *ends, *call.sizes(dwx), clip),
                HAS_DLAST=has_dlast,
                STAGES=tile.stages,
                HOLD=tile.hold,
                BD=padded(dim),
                BB=tile.bb,
                tile=tile,
                **flags,
            )
        else:
            from .rnn_triton_tiled import backward_tiled

            whole = call.plan.form == "whole"
            parts = 1 if whole else -(-dim // tile.bd)
            for step_ in [steps - 1] if whole else range(steps - 1, -2 if has_state else -1, -1):
                launch(
                    backward_tiled,
                    parts * heads * -(-batch // tile.bb),
                    *(
                        planes,
                        call.r,
                        call.starts,
                        dh,
                        *_four(carried),
                        dwx,
                        dg,
                        *call.sizes(dwx),
                        step_,
                        clip,
                    ),
                    WHOLE=whole,
                    BD=tile.bd,
                    BK=tile.bk,
                    BB=tile.bb,
                    tile=tile,
                    **flags,
                )
        dstate: tuple[Tensor | None, ...] = (None,) * len(state)
        if has_state:
            if form.cell == "slstm":
                _, dc, dn, mu = carried
                mu.addcmul_(initial[1], dc).addcmul_(initial[2], dn)
            dstate = tuple(carried)
        gates = list(dwx.unbind(2))
        sums = [x.sum((0, 1), dtype=torch.float32) for x in ([] if b is None else gates)]
        if dg is not None:
            gates = [dg, *gates[:2]]
            sums = sums and [dg.sum((0, 1), dtype=torch.float32), *sums]
        return dwx, _grad_r(read, gates).to(r.dtype), torch.stack(sums).to(b.dtype) if sums else None, dstate


def step(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    form: Form,
    tile: Tile | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step in one launch: wx (B, G, H, D) -> h (B, H, D) in its dtype and the next state."""
    call = _Call(wx[:, None], r, b, None, form._replace(reverse=False), None)
    wx = call.wx
    batch, _, _, heads, dim = wx.shape
    h = wx.new_empty(batch, 1, heads, dim)
    last = [wx.new_empty(batch, heads, dim, dtype=torch.float32) for _ in state]
    given = _filled(state)
    if state[0] is None:
        given = _four([torch.zeros_like(last[0])] * len(state))
    with on_device(wx):
        read = given[0].to(wx.dtype)
        _forward_tiled(call, wx, read, given, h, last, 0, tile or call.plan.step, keep=False)
    return h[:, 0], tuple(last)


class _Call:
    """What the launches of one call share."""

    def __init__(self, wx, r, b, starts, form: Form, plan: Plan | None):
        self.wx = rowwise(wx)
        self.r = r.to(wx.dtype).contiguous()
        self.b = None if b is None else b.contiguous()
        self.starts = None if starts is None else starts.contiguous().view(torch.uint8)
        self.form = form
        self.plan = plan or plan_for(kind_of(wx.device), wx.dtype, form.cell, wx.shape[-1])

    def sizes(self, x: Tensor) -> tuple[int, ...]:
        """Strides of B, T, G and H of wx or its gradient, in units of `_align`, and their sizes."""
        unit, batch, steps, _, heads, _ = _align(x), *x.shape
        return *(stride // unit for stride in strides(x, axes=4)), batch, steps, heads

    def flags(self, x: Tensor, bias: bool = True) -> dict:
        half = x.dtype != torch.float32
        flags = {
            "D": x.shape[-1],
            "CELL": _IDS[self.form.cell],
            "RESET": self.starts is not None,
            "REVERSE": self.form.reverse,
            "UPCAST": half and interpreting(),
            "PRECISION": "ieee" if half else float32_precision(x.device, False),
            "ALIGN": _align(x),
        }
        return flags | {"HAS_BIAS": self.b is not None} if bias else flags


def _forward_tiled(call, wx, read, given, h, last, first, tile, *, whole=False, keep=True) -> None:
    from .rnn_triton_tiled import forward_tiled

    batch, _, _, heads, dim = wx.shape
    parts = 1 if whole else -(-dim // tile.bd)
    launch(
        forward_tiled,
        parts * heads * -(-batch // tile.bb),
        *(wx, call.r, call.b, call.starts, read, *given, h, *_four(last), *call.sizes(wx), first),
        WHOLE=whole,
        KEEP=keep,
        BD=tile.bd,
        BK=tile.bk,
        BB=tile.bb,
        tile=tile,
        **call.flags(wx),
    )


def _replay(call, wx, read, initial, has_state: bool, planes) -> None:
    from .rnn_triton_tiled import replay

    batch, _, _, heads, dim = wx.shape
    tile = call.plan.replay
    launch(
        replay,
        -(-dim // tile.bd) * heads * -(-batch // tile.bb),
        *(wx, call.r, call.b, read, call.starts, *initial, planes, *call.sizes(wx)),
        HAS_STATE=has_state,
        STAGES=tile.stages,
        BD=tile.bd,
        BK=tile.bk,
        BB=tile.bb,
        tile=tile,
        **call.flags(wx),
    )


def _read(h: Tensor, h0: Tensor | None, starts: Tensor | None, reverse: bool) -> Tensor:
    """The h that each step read, (B, T, H, D)."""
    read = torch.empty_like(h)
    if reverse:
        read[:, :-1], ends = h[:, 1:], read[:, -1]
    else:
        read[:, 1:], ends = h[:, :-1], read[:, 0]
    ends.zero_() if h0 is None else ends.copy_(h0)
    return read if starts is None else read.masked_fill_(starts[:, :, None, None], 0.0)


def _grad_r(read: Tensor, gates: list[Tensor]) -> Tensor:
    """(H, D, S, D) from what was read and the gates' gradients, (B, T, H, D) each."""
    heads, dim = read.shape[2:]
    read = read.view(-1, heads, dim).permute(1, 2, 0)
    return torch.stack([torch.bmm(read, x.reshape(-1, heads, dim).transpose(0, 1)) for x in gates], 2)


def _mu(dlast: list[Tensor | None], last: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of the last m at fixed c exp(m) and n exp(m)."""
    mu = dlast[3]
    for x, dx in zip(last[1:3], dlast[1:3]):
        if dx is not None:
            mu = -x * dx if mu is None else torch.addcmul(mu, x, dx, value=-1.0)
    return mu


def _filled(state: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return _four([None if x is None else x.float().contiguous() for x in state])


def _four(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, None, None, None)[:4]


def _align(x: Tensor) -> int:
    """What D and all strides are multiples of, 16 at most: how wide memory may be read."""
    return math.gcd(16, x.shape[-1], *strides(x, axes=4))

"""What a Vision-LSTM layer does between its two projections, as one function and as one operator of torch.

From the up-projected map u = [a, z] (Vision-LSTM, arXiv 2406.04303, section 3)::

    c = SiLU(conv(a));   q = Wq c,  k = Wk c,  v = Wv a          block-diagonal, blocks of W channels
    i, f = gates([q, k, v]);   h = mLSTM(q, k, v, i, f)           H heads of D channels
    y = ((1 + w) norm(h) + b + skip * c) * SiLU(z)                norm: over D, for each token and head

A layer that runs backward needs no flipped copy: its kernel is rotated by 180 degrees and the mLSTM runs in
reverse. `mix` is the entry; `mix_plain` is the readable twin that autograd differentiates. The operator
``vilma::vil_mix`` keeps only u, h and the gates for its backward pass and computes the rest again.

Shapes: B batch, (Y, X) grid, N = Y X tokens, E = H D inner width, W block width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vilma.xlstm import mix_triton, mlstm
from vilma.xlstm.mlstm_chunkwise import no_autocast
from vilma.xlstm.operators import _backward as mlstm_backward
from vilma.xlstm.operators import _backward_flops as mlstm_backward_flops
from vilma.xlstm.operators import _flops as mlstm_flops
from vilma.xlstm.operators import _forward as mlstm_forward

from . import mixing_cpu

_WIDE = 16  # narrow blocks are gathered into products of this width
_EPS = 1e-6  # added to the mLSTM's normaliser


class MixWeights(NamedTuple):
    """Parameters of the mixing, in the order in which the operator takes them.

    conv_weight is (E, 1, k, k) for a 2-D convolution of odd k, (E, 1, k) for a causal one along the tokens.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    q_weight: Tensor  # (E / W, W out, W in)
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    i_weight: Tensor  # (H, 3 E)
    i_bias: Tensor
    f_weight: Tensor
    f_bias: Tensor
    norm_weight: Tensor  # (E), stored less one
    norm_bias: Tensor | None
    skip: Tensor  # (E)


def mix(u: Tensor, weights: MixWeights, reverse: bool, eps: float) -> Tensor:
    """u (B, Y, X, 2 E) -> y (B, Y, X, E); ``reverse`` traverses the tokens from the last one on.

    eps: added to the variance of h. Gates are computed in float32 or better, the rest in u's dtype.

    Raises:
        RuntimeError: an input carries a tangent of forward-mode differentiation.
    """
    if torch.compiler.is_compiling() and u.is_cuda and not mix_triton.supports(u, weights):
        return mix_plain(u, weights, reverse, eps)  # the compiler fuses what surrounds the mLSTM
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_tangents(u, *weights)
    # a traced program is checked against a second trace that is made without gradients
    save = torch.is_grad_enabled() and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
    return torch.ops.vilma.vil_mix(u, *weights, reverse, eps, save)[0]


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """An operator without a rule for them drops them silently."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("vil_mix has no forward-mode derivative; call vilma.vil.mixing.mix_plain for it")


def mix_plain(u: Tensor, weights: MixWeights, reverse: bool, eps: float) -> Tensor:
    """As `mix`, written with torch's own operators."""
    with no_autocast(u):
        w = MixWeights(*(x if x is None else x.to(u.dtype) for x in weights))
        acc = torch.promote_types(u.dtype, torch.float32)
        a, z = u.chunk(2, -1)
        c = F.silu(convolve(a, w.conv_weight, w.conv_bias, reverse))
        tokens = (
            block_diagonal(c, w.q_weight, w.q_bias),
            block_diagonal(c, w.k_weight, w.k_bias),
            block_diagonal(a, w.v_weight, w.v_bias),
        )
        qkv = torch.cat([x.flatten(1, 2) for x in tokens], -1)
        i = F.linear(qkv.to(acc), weights.i_weight.to(acc), weights.i_bias.to(acc)).mT
        f = F.linear(qkv.to(acc), weights.f_weight.to(acc), weights.f_bias.to(acc)).mT
        q, k, v = (x.unflatten(-1, (i.shape[1], -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        h = mlstm(q, k, v, i, f, reverse=reverse, eps=_EPS).transpose(1, 2)
        h = F.layer_norm(h, h.shape[-1:], eps=eps).reshape(c.shape) * (1 + w.norm_weight) + w.skip * c
        h = h if w.norm_bias is None else h + w.norm_bias
        return h * F.silu(z)


def convolve(a: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Depthwise convolution of a (B, Y, X, E): 2-D, or causal along the tokens in the order of traversal."""
    if weight.dim() == 4:
        weight = weight.flip(-1, -2) if reverse else weight
        y = F.conv2d(a.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=a.shape[-1])
        return y.permute(0, 2, 3, 1).contiguous()  # no copy on a CPU; cuDNN may answer in another layout
    batch, height, width, channels = a.shape
    steps, reach = height * width, weight.shape[-1] - 1
    weight = (weight.flip(-1) if reverse else weight).unsqueeze(2)
    a = a.reshape(batch, 1, steps, channels).permute(0, 3, 1, 2)
    y = F.conv2d(a, weight, bias, padding=(0, reach), groups=channels)
    y = y.narrow(3, reach if reverse else 0, steps)
    return y.permute(0, 2, 3, 1).reshape(batch, height, width, channels)


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., E) -> (..., E), each block of W channels by its own matrix of weight (E / W, out, in)."""
    wide = _wide(weight)
    blocks = x.reshape(-1, wide.shape[0], wide.shape[1]).transpose(0, 1)
    y = torch.bmm(blocks, wide.mT).transpose(0, 1).reshape(x.shape)
    return y if bias is None else y + bias


def _wide(weight: Tensor) -> Tensor:
    """Neighbouring blocks on the diagonal of wider ones: their zeros cost less than narrow products."""
    blocks, width, _ = weight.shape
    count = max(1, _WIDE // width)
    while blocks % count:
        count -= 1
    weight = weight.unflatten(0, (-1, count)).permute(0, 2, 3, 1)
    return torch.diag_embed(weight).permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)


def _narrow(wide: Tensor, width: int) -> Tensor:
    """The diagonal blocks of wide ones: what of a gradient of `_wide(weight)` belongs to weight."""
    count = wide.shape[-1] // width
    blocks = wide.unflatten(1, (count, width)).unflatten(3, (count, width))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


_LIBRARY = torch.library.Library("vilma", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPTIONAL = ("conv_bias", "q_bias", "k_bias", "v_bias", "norm_bias")
_INPUTS = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in ("u", *MixWeights._fields))
_COUNT = len(MixWeights._fields)
_MLSTM_FORM = (True, True)  # exponential input gate, normalised


_LIBRARY.define(
    f"vil_mix({_INPUTS}, bool reverse, float eps, bool save) -> "
    "(Tensor y, Tensor h, Tensor gates, Tensor s0, Tensor s1, Tensor s2, Tensor s3)",
    tags=_TAGS,
)


def _forward(u, *rest):
    weights, (reverse, eps, save) = rest[:_COUNT], rest[_COUNT:]
    with no_autocast(u):
        if mix_triton.serves(u, MixWeights(*weights)):
            return _forward_triton(u, _whole(weights), reverse, eps, save)
        w = _cast(weights, u.dtype)
        if mixing_cpu.serves(u, w):
            return _forward_cpu(u.contiguous(), w, reverse, eps, save)
        a, z = u.chunk(2, -1)
        c = F.silu(convolve(a, w.conv_weight, w.conv_bias, reverse), inplace=True)
        qkv = _project(a, c, w)
        gates = _gates(qkv, weights)
        h, saved = _mlstm(qkv, gates, reverse, save)
        y = F.layer_norm(h, h.shape[-1:], eps=eps).view(c.shape)
        y = _affine(y, c.mul_(w.skip), w).mul_(F.silu(z))
    return (y, h, gates, *saved) if save else (y, *(y.new_empty(0) for _ in range(6)))


def _forward_cpu(u, w, reverse, eps, save):
    """Nothing to keep: a few images after another, so that what is between the steps stays in the cache."""
    y = u.new_empty(*u.shape[:-1], u.shape[-1] // 2)
    count = len(u) if save else mixing_cpu.images_at_once(u)
    for images, out in zip(u.split(count), y.split(count)):
        c, qkv, gates = mixing_cpu.before(images, w, reverse, gates=True, lent=not save)
        h, saved = _mlstm(qkv, gates, reverse, save)
        mixing_cpu.behind(images, w, eps, c, h, out)
    return (y, h, gates, *saved) if save else (y, *(y.new_empty(0) for _ in range(6)))


def _forward_triton(u, w, reverse, eps, save):
    rows = mix_triton.rows(u)
    c, qkv, gates = mix_triton.before(rows, w, u.shape[1:3], reverse, gates=True)
    h, saved = _mlstm(qkv, gates, reverse, save, run=mlstm_forward)
    y = mix_triton.behind(rows, w, eps, c, h).view(*u.shape[:-1], -1)
    return (y, h, gates, *saved) if save else (y, *(y.new_empty(0) for _ in range(6)))


def _forward_fake(u, *rest):
    w, save = MixWeights(*rest[:_COUNT]), rest[-1]
    heads, inner = w.i_weight.shape[0], u.shape[-1] // 2
    y = u.new_empty(*u.shape[:-1], inner)
    if not save:
        return y, *(u.new_empty(0) for _ in range(6))
    qkv = u.new_empty(u.shape[0], u.shape[1] * u.shape[2], 3, inner)
    gates = u.new_empty(*qkv.shape[:2], 2 * heads, dtype=torch.promote_types(u.dtype, torch.float32))
    h, saved = _mlstm(qkv, gates, rest[_COUNT], save)
    return y, h, gates, *saved


def _cast(weights, dtype) -> MixWeights:
    return MixWeights(*(x if x is None else x.to(dtype).contiguous() for x in weights))


def _whole(weights) -> MixWeights:
    return MixWeights(*(x if x is None else x.contiguous() for x in weights))


def _affine(hn: Tensor, skipped: Tensor, w: MixWeights) -> Tensor:
    t = torch.addcmul(skipped, hn, 1 + w.norm_weight)
    return t if w.norm_bias is None else t.add_(w.norm_bias)


def _project(a: Tensor, c: Tensor, w: MixWeights) -> Tensor:
    """q, k and v side by side (B, N, 3, E)."""
    batch, height, width, inner = a.shape
    qkv = a.new_empty(batch, height * width, 3, inner)
    for j, (x, weight, bias) in enumerate(
        ((c, w.q_weight, w.q_bias), (c, w.k_weight, w.k_bias), (a, w.v_weight, w.v_bias))
    ):
        y = block_diagonal(x, weight, bias)
        qkv[:, :, j] = y.view(batch, -1, inner)
    return qkv


def _gates(qkv: Tensor, weights) -> Tensor:
    """Pre-activations of the gates (B, N, 2 H): i, then f."""
    w = MixWeights(*weights)
    acc = torch.promote_types(qkv.dtype, torch.float32)
    weight, bias = torch.cat((w.i_weight, w.f_weight)).to(acc), torch.cat((w.i_bias, w.f_bias)).to(acc)
    return F.linear(qkv.flatten(2).to(acc), weight, bias)


def _heads(qkv: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
    """q, k, v (B, H, N, D) and i, f (B, H, N) as views."""
    i, f = gates.mT.chunk(2, 1)
    return *qkv.unflatten(-1, (i.shape[1], -1)).permute(2, 0, 3, 1, 4), i, f


def _mlstm(
    qkv: Tensor, gates: Tensor, reverse: bool, save: bool, run=torch.ops.vilma.mlstm
) -> tuple[Tensor, list[Tensor]]:
    """h (B, N, H, D) and what its backward pass wants kept. run: the operator, or the function behind it."""
    empty = (None,) * 4
    h, _, _, _, *saved = run(
        *_heads(qkv, gates), *empty, *_MLSTM_FORM, reverse, None, _EPS, "auto", False, save
    )
    return h.transpose(1, 2).contiguous(), saved


_LIBRARY.define(
    f"vil_mix_backward(Tensor dy, {_INPUTS}, bool reverse, float eps, Tensor h, Tensor gates, Tensor s0, "
    "Tensor s1, Tensor s2, Tensor s3) -> (" + ", ".join(["Tensor"] * (_COUNT + 1)) + ")",
    tags=_TAGS,
)


def _backward(dy, u, *rest):
    weights, (reverse, eps, h, gates, *saved) = MixWeights(*rest[:_COUNT]), rest[_COUNT:]
    with no_autocast(u):
        if mix_triton.serves(u, weights):
            du, grads = _gradients_triton(dy, u, _whole(weights), reverse, eps, h, gates, saved)
            return du, *(u.new_empty(0) if x is None else grads[n] for n, x in weights._asdict().items())
        w = _cast(weights, u.dtype)
        run = _gradients_cpu if mixing_cpu.serves(u, w) else _gradients
        du, grads = run(dy, u, w, weights, reverse, eps, h, gates, saved)
    outputs = [du]
    for name, parameter in weights._asdict().items():
        outputs.append(u.new_empty(0) if parameter is None else grads[name].to(parameter.dtype).contiguous())
    return tuple(outputs)


def _gradients_cpu(dy, u, w, weights, reverse, eps, h, gates, saved):
    u = u.contiguous()
    du = torch.empty_like(u)
    c, qkv, p = mixing_cpu.before(u, w, reverse, gates=False, lent=True)
    dh, dc, grads = mixing_cpu.behind_backward(dy, u, w, eps, c, h, du)
    d_tokens, d_gates = _mlstm_backward(qkv, gates, dh, h, reverse, saved)
    d_gates = _joined(d_gates)
    grads |= mixing_cpu.before_backward(u, w, reverse, c, p, d_tokens, d_gates, du, dc)
    return du, grads


def _gradients_triton(dy, u, w, reverse, eps, h, gates, saved):
    rows, grid = mix_triton.rows(u), u.shape[1:3]
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    flat = du.view(rows.shape)
    p, qkv, _ = mix_triton.before(rows, w, grid, reverse, gates=False)
    dh, dc, grads = mix_triton.behind_backward(mix_triton.rows(dy), rows, w, eps, p, h, flat)
    d_tokens, d_gates = _mlstm_backward(qkv, gates, dh, h, reverse, saved, run=mlstm_backward)
    d_tokens, d_gates = ([x.contiguous() for x in parts] for parts in (d_tokens, d_gates))
    return du, grads | mix_triton.before_backward(rows, w, grid, reverse, p, d_tokens, d_gates, dc, flat)


def _gradients(dy, u, w, weights, reverse, eps, h, gates, saved) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Of u, and of the parameters by name. w: weights in u's dtype."""
    acc = torch.promote_types(u.dtype, torch.float32)
    a, z = u.chunk(2, -1)
    p = convolve(a, w.conv_weight, w.conv_bias, reverse)
    c = F.silu(p)
    qkv = _project(a, c, w)
    dim = h.shape[3]

    def total(x: Tensor) -> Tensor:
        return x.flatten(0, -2).sum(0, dtype=acc)

    hn, mean, rstd = torch.native_layer_norm(h, (dim,), None, None, eps)
    hn = hn.view(c.shape)
    t = _affine(hn, c * w.skip, w)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    da, dz = du.chunk(2, -1)
    dz.copy_(torch.ops.aten.silu_backward(dy * t, z))
    dt = dy * F.silu(z)
    d_skip, d_norm_weight = total(dt * c), total(dt * hn)
    d_norm_bias = total(dt) if w.norm_bias is not None else None
    dc = dt * w.skip
    dh = (dt * (1 + w.norm_weight)).view(h.shape)
    mask = (True, False, False)
    dh = torch.ops.aten.native_layer_norm_backward(dh, h, (dim,), mean, rstd, None, None, mask)[0]

    d_tokens, d_gates = _mlstm_backward(qkv, gates, dh, h, reverse, saved)
    d_gates = _joined(d_gates)
    gate_weight = torch.cat((weights.i_weight, weights.f_weight)).to(acc)
    flat = d_gates.flatten(0, 1)
    d_gate_weight = flat.mT @ qkv.flatten(2).flatten(0, 1).to(acc)
    d_gate_bias = flat.sum(0)
    d_qkv = (flat @ gate_weight).to(u.dtype).view(qkv.shape)
    for j, x in enumerate(d_tokens):
        d_qkv[:, :, j] += x

    grads: dict[str, Tensor | None] = {}
    for j, (name, x) in enumerate((("q", c), ("k", c), ("v", a))):
        dy_j = d_qkv[:, :, j].reshape(x.shape)
        weight, bias = getattr(w, f"{name}_weight"), getattr(w, f"{name}_bias")
        wide = _wide(weight)
        blocks = dy_j.reshape(-1, wide.shape[0], wide.shape[1]).transpose(0, 1)
        inputs = x.reshape(-1, wide.shape[0], wide.shape[1]).transpose(0, 1)
        grads[f"{name}_weight"] = _narrow(torch.bmm(blocks.mT, inputs), weight.shape[-1])
        grads[f"{name}_bias"] = None if bias is None else total(dy_j)
        dx = torch.bmm(blocks, wide).transpose(0, 1).reshape(x.shape)
        if name == "v":
            da.copy_(dx)
        else:
            dc += dx
    dp = torch.ops.aten.silu_backward(dc, p)
    da_conv, grads["conv_weight"], grads["conv_bias"] = _convolve_backward(dp, a, w, reverse)
    da += da_conv
    grads["i_weight"], grads["f_weight"] = d_gate_weight.chunk(2)
    grads["i_bias"], grads["f_bias"] = d_gate_bias.chunk(2)
    grads["norm_weight"], grads["norm_bias"], grads["skip"] = d_norm_weight, d_norm_bias, d_skip
    return du, grads


def _mlstm_backward(
    qkv, gates, dh, h, reverse, saved, run=torch.ops.vilma.mlstm_backward
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Gradients of q, k, v (B, N, E) and of both gates (B, H, N)."""
    none, empty = (None,) * 4, gates.new_empty(0)
    dq, dk, dv, di, df, *_ = run(
        *_heads(qkv, gates),
        *none,
        *_MLSTM_FORM,
        reverse,
        None,
        _EPS,
        "auto",
        dh.transpose(1, 2),
        *none[1:],
        h.transpose(1, 2),
        *(empty,) * 3,
        *saved,
    )
    return [x.transpose(1, 2).flatten(2) for x in (dq, dk, dv)], (di, df)


def _joined(d_gates: tuple[Tensor, Tensor]) -> Tensor:
    """(B, N, 2 H): i, then f."""
    return torch.cat(d_gates, 1).mT.contiguous()


def _convolve_backward(dp: Tensor, a: Tensor, w: MixWeights, reverse: bool):
    """Gradients of a, of the kernel and of its bias."""
    weight, channels, plane = w.conv_weight, a.shape[-1], a.shape
    axes = (-1, -2)[: weight.dim() - 2]
    reach = weight.shape[-1] - 1
    if weight.dim() == 4:
        padding = [reach // 2] * 2
    else:
        padding = [0, reach]
        a, dp = a.reshape(plane[0], 1, -1, channels), dp.reshape(plane[0], 1, -1, channels)
        dp = F.pad(dp, (0, 0, reach, 0) if reverse else (0, 0, 0, reach))
    kernel = weight.flip(axes) if reverse else weight
    da, dw, db = torch.ops.aten.convolution_backward(
        dp.permute(0, 3, 1, 2),
        a.permute(0, 3, 1, 2),
        kernel if kernel.dim() == 4 else kernel.unsqueeze(2),
        [channels],
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        channels,
        [True, True, w.conv_bias is not None],
    )
    dw = dw.view(weight.shape)
    return da.permute(0, 2, 3, 1).reshape(plane), dw.flip(axes) if reverse else dw, db


def _backward_fake(dy, u, *rest):
    return torch.empty_like(u, memory_format=torch.contiguous_format), *(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in rest[:_COUNT]
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.eps, ctx.save = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * (_COUNT + 4)
    saved = ctx.saved_tensors  # once: what a checkpoint recomputes is handed out a single time
    tensors, kept = saved[: _COUNT + 1], saved[_COUNT + 1 :]
    if not ctx.save:
        kept = torch.ops.vilma.vil_mix(*tensors, ctx.reverse, ctx.eps, True)[1:]
    grads = torch.ops.vilma.vil_mix_backward(dy, *tensors, ctx.reverse, ctx.eps, *kept)
    return *(None if x is None else g for x, g in zip(tensors, grads)), None, None, None


def _refuse(*_):
    raise RuntimeError("vil_mix has no second derivative; call vilma.vil.mixing.mix_plain where it is needed")


_LIBRARY.impl("vil_mix", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("vil_mix_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::vil_mix", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("vilma::vil_mix_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("vilma::vil_mix", _autograd, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("vilma::vil_mix_backward", _refuse, lib=_LIBRARY)


def _products(u, conv_weight, q_weight, heads) -> tuple[int, int, tuple[int, ...]]:
    """Multiplications of the convolution and of q, k, v; those of the gates; the shape of q."""
    batch, height, width, inner = u
    tokens, inner = batch * height * width, inner // 2
    taps = conv_weight[-1] ** (len(conv_weight) - 2)
    per_head = batch, heads, height * width, inner // heads
    return tokens * inner * (taps + 3 * q_weight[-1]), tokens * inner * 6 * heads, per_head


@register_flop_formula(torch.ops.vilma.vil_mix)
def _flops(u, conv_weight, conv_bias, q_weight, *rest, out_shape=None, **_) -> int:
    """Products of the equations: blocks of their own width, the mLSTM by its own formula."""
    inner, gates, q = _products(u, conv_weight, q_weight, rest[5][0])
    form = (*_MLSTM_FORM, False, None, _EPS, "auto")
    return 2 * (inner + gates) + mlstm_flops(q, q, q, *(None,) * 6, *form, False, False)


@register_flop_formula(torch.ops.vilma.vil_mix_backward)
def _backward_flops(dy, u, conv_weight, conv_bias, q_weight, *rest, out_shape=None, **_) -> int:
    """Two products for each one, and what is computed again (all but the mLSTM and the gates)."""
    inner, gates, q = _products(u, conv_weight, q_weight, rest[5][0])
    form = (*_MLSTM_FORM, False, None, _EPS, "auto")
    return 2 * (3 * inner + 2 * gates) + mlstm_backward_flops(q, q, q, *(None,) * 6, *form, *(None,) * 4)

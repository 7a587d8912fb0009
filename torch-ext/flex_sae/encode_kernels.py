"""The encoder of a TopK sparse autoencoder: pre-activations, the k largest of each sample, and sparse gradients.

With pre = x W^T + b, a sample's vals are the k largest of its pre (through relu), and indices are where they were. Only
these pairs have a gradient h (zero where relu is), so that the gradients are

    d W[f] = sum over pairs (b, i) with indices[b, i] = f of h[b, i] x_b,    d bias[f] = sum of the same h[b, i],
    d x_b = sum_i h[b, i] W[indices[b, i]].

pre exists for a block of samples at a time, and no gradient of it does. The first two are sums over the pairs of each
feature (segment_sum.py), the last is a decode (decode_kernels.py).
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import check_encode_inputs, check_sparse_encode_inputs
from .decode_kernels import decode
from .dispatch import compute_dtype, device_of, linear_dtype, needs_gradients, refuse_second_derivative, runs_triton
from .launch import cached_launch
from .ordering import order_pairs
from .reference import linear, unchecked_sparse_encode, unchecked_topk_encode
from .segment_sum import SegmentSum, sum_coefs
from .selection import select_largest, selection_bytes
from .tiles import cdiv, gather_columns, load_offsets, next_power_of_2, row_alignment, sample_tile, unit_stride_rows

# pre and the selection take up to 300 MiB, or 1024 samples: with fewer the matmul reads weight too often. On an H100
# (B=4096, F=65536, D=2304, TF32) it takes 3.81 ms with 1024 at a time, 3.95 with 512, 4.24 with 256; 3.55 with all.
_PRE_BYTES, _MIN_ROWS = 300 * 2**20, 1024
# Steps of a tile of the sparse product, and how much wider it is than one of the decode. On an H100 (B=4096, K=64,
# F=65536, D=2304) 8 steps of once, twice, four times the columns take 0.49, 0.43, 0.59 ms, 16 take 0.51, 0.48, 0.58.
_BLOCK_K, _TILE_SCALE = 8, 2
# Pairs of a program, four warps, that adds up the shares of dot products, as in segment_sum.py.
_BLOCK_P = 128


@cached_launch
@triton.jit(do_not_specialize=["F", "P", "weight_stride", "x_stride"])
def _sparse_dots_kernel(
    dots_ptr,  # [cdiv(D, BLOCK_D), P], this tile's share of <x_b, weight[indices[p]]>
    x_ptr,  # [B, D]
    weight_ptr,  # [F, D]
    indices_ptr,  # [P], those of sample b from b * K or offsets[b] on
    offsets_ptr,  # [B + 1], or None
    x_stride,
    weight_stride,
    K,
    F,
    P,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, tile, cols, in_row = sample_tile(D, BLOCK_D)
    dtype: tl.constexpr = dots_ptr.dtype.element_ty
    start = b * K
    if offsets_ptr is not None:
        start, end = load_offsets(offsets_ptr, b, P)
        K = (end - start).to(tl.int32)
    indices_ptr += start
    dots_ptr += tile.to(tl.int64) * P + start
    x = tl.load(x_ptr + b * x_stride + cols, mask=in_row, other=0.0).to(dtype)
    for first in range(0, K, BLOCK_K):
        steps = first + tl.arange(0, BLOCK_K)
        exists = steps < K
        feature = tl.load(indices_ptr + steps, mask=exists, other=0).to(tl.int64)
        valid = (feature >= 0) & (feature < F)
        row = tl.multiple_of(tl.where(valid, feature, 0) * weight_stride, ALIGN)
        mask = ((valid & exists) | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
        dots = tl.sum(x[None, :] * weight.to(dtype), axis=1)
        tl.store(dots_ptr + steps, tl.where(valid, dots, float("nan")), mask=exists)


@cached_launch
@triton.jit(do_not_specialize=["B", "F", "P"])
def _add_bias_kernel(
    vals_ptr,  # [P]
    dots_ptr,  # [tiles, P]
    bias_ptr,  # [F], or None
    indices_ptr,  # [P]
    offsets_ptr,  # [B + 1], or None
    B,
    F,
    P,
    tiles,
    BLOCK_P: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < P
    if offsets_ptr is not None:
        exists = exists & (p < tl.load(offsets_ptr + B))
    val = tl.zeros([BLOCK_P], dots_ptr.dtype.element_ty)
    for _ in range(tiles):
        val += tl.load(dots_ptr + p, mask=exists, other=0.0)
        dots_ptr += P
    if bias_ptr is not None:
        feature = tl.load(indices_ptr + p, mask=exists, other=0)
        in_range = (feature >= 0) & (feature < F)
        val += tl.load(bias_ptr + feature, mask=exists & in_range, other=0.0).to(val.dtype)
    tl.store(vals_ptr + p, val, mask=p < P)  # spare room is zero


def block_rows(B: int, F: int, k: int, dtype: torch.dtype) -> int:
    """The samples whose pre exists at a time: blocks of one size, of whole tiles of a matmul."""
    rows = max(_MIN_ROWS, _PRE_BYTES // selection_bytes(F, k, dtype) // 128 * 128)
    return cdiv(cdiv(B, cdiv(B, rows)), 128) * 128


def _topk_encode(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    k: int,
    relu: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vals [B, k] in ``dtype``, that of pre, and indices [B, k]."""
    B, F = len(x), len(weight)
    vals, indices = x.new_empty(B, k, dtype=dtype), x.new_empty(B, k, dtype=torch.int64)
    weight = weight.to(dtype)  # once, and not in every block
    rows = block_rows(B, F, k, dtype)
    with device_of(x):
        for start in range(0, B, rows):
            block = slice(start, start + rows)
            select_largest(linear(x[block], weight, bias, dtype), vals[block], indices[block], relu)
    return vals, indices


def _sparse_encode(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    indices: torch.Tensor,  # [B, K], or [P]
    offsets: Optional[torch.Tensor],  # [B + 1]
    dtype: torch.dtype,
) -> torch.Tensor:
    """pre at the indices, in ``dtype``."""
    (B, D), F, P = x.shape, len(weight), indices.numel()
    x, weight, indices = unit_stride_rows(x), unit_stride_rows(weight), indices.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    accumulated = torch.promote_types(dtype, torch.float32)
    K = 0 if offsets is not None else indices.shape[1]
    block_k = _BLOCK_K if offsets is not None else min(_BLOCK_K, next_power_of_2(K))
    block_d = min(_TILE_SCALE * gather_columns(weight, accumulated), next_power_of_2(D))
    tiles = cdiv(D, block_d)
    vals = x.new_empty(indices.shape, dtype=dtype)
    dots = x.new_empty(tiles, P, dtype=accumulated)
    with device_of(x):
        _sparse_dots_kernel[(B, tiles)](
            dots,
            x,
            weight,
            indices,
            offsets,
            x.stride(0),
            weight.stride(0),
            K,
            F,
            P,
            D=D,
            EVEN_K=offsets is None and K % block_k == 0,
            ALIGN=row_alignment(weight, block_d // 32),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
        _add_bias_kernel[(cdiv(P, _BLOCK_P),)](
            vals,
            dots,
            None if bias is None else bias.contiguous(),
            indices,
            offsets,
            B,
            F,
            P,
            tiles,
            BLOCK_P=_BLOCK_P,
        )
    return vals


def _encode_backward(
    vals_grad: torch.Tensor,  # [B, K], or [P]
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    indices: torch.Tensor,  # as vals_grad
    offsets: Optional[torch.Tensor],  # [B + 1]
    bias_dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias, an empty tensor for one that is not needed."""
    F, D = weight.shape
    vals_grad, indices = vals_grad.contiguous(), indices.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    dtype = compute_dtype(vals_grad)  # float64 if any input is
    x_grad = x.new_empty(0)
    weight_grad = weight.new_empty((F, D) if needs_weight else 0)
    bias_grad = weight.new_empty(F if needs_bias else 0, dtype=bias_dtype)
    with device_of(x):
        if needs_x:
            x_grad = decode(indices, weight, vals_grad, None, offsets, x.dtype)
        if needs_weight or needs_bias:
            pairs = order_pairs(indices, vals_grad, F, dtype, offsets=offsets)
            if needs_weight:
                sums = SegmentSum(pairs, x.new_ones((), dtype=dtype), D, weight_grad)
                sums.add(unit_stride_rows(x))
                sums.finish()
            if needs_bias:
                sum_coefs(pairs, bias_grad)
    return x_grad, weight_grad, bias_grad


torch.library.define(
    add_op_namespace_prefix("topk_encode"),
    "(Tensor x, Tensor weight, Tensor? bias, SymInt k, bool relu, ScalarType dtype) -> (Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("topk_encode"), "default", _topk_encode)

torch.library.define(
    add_op_namespace_prefix("sparse_encode"),
    "(Tensor x, Tensor weight, Tensor? bias, Tensor indices, Tensor? offsets, ScalarType dtype) -> Tensor",
)
torch.library.impl(add_op_namespace_prefix("sparse_encode"), "default", _sparse_encode)

torch.library.define(
    add_op_namespace_prefix("encode_backward"),
    "(Tensor vals_grad, Tensor x, Tensor weight, Tensor indices, Tensor? offsets, ScalarType bias_dtype,"
    " bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("encode_backward"), "default", _encode_backward)


@torch.library.register_fake(add_op_namespace_prefix("topk_encode"))
def _topk_encode_fake(x, weight, bias, k, relu, dtype):
    shape = x.shape[0], k
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake(add_op_namespace_prefix("sparse_encode"))
def _sparse_encode_fake(x, weight, bias, indices, offsets, dtype):
    return x.new_empty(indices.shape, dtype=dtype)


@torch.library.register_fake(add_op_namespace_prefix("encode_backward"))
def _encode_backward_fake(vals_grad, x, weight, indices, offsets, bias_dtype, needs_x, needs_weight, needs_bias):
    return (
        x.new_empty(x.shape if needs_x else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _gradients(ctx, vals_grad, x, weight, indices, offsets=None):
    """The gradients of x, weight and bias, None for one that is not needed."""
    needs = ctx.needs_input_grad[:3]
    grads = ops.encode_backward(vals_grad, x, weight, indices, offsets, ctx.bias_dtype, *needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs))


class TopKEncode(torch.autograd.Function):
    """See `triton_topk_encode`."""

    @staticmethod
    def forward(ctx, x, weight, bias, k, relu, dtype):
        vals, indices = ops.topk_encode(x, weight, bias, k, relu, dtype)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, vals if relu else None, indices)
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        return vals, indices

    @staticmethod
    def backward(ctx, vals_grad, _):
        refuse_second_derivative("triton_topk_encode")
        if vals_grad is None:
            return (None,) * 6
        x, weight, vals, indices = ctx.saved_tensors
        if vals is not None:
            vals_grad = torch.ops.aten.threshold_backward(vals_grad, vals, 0)
        return *_gradients(ctx, vals_grad, x, weight, indices), None, None, None


class SparseEncode(torch.autograd.Function):
    """See `triton_sparse_encode`."""

    @staticmethod
    def forward(ctx, x, weight, bias, indices, offsets, dtype):
        ctx.save_for_backward(x, weight, indices, offsets)
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        return ops.sparse_encode(x, weight, bias, indices, offsets, dtype)

    @staticmethod
    def backward(ctx, vals_grad):
        refuse_second_derivative("triton_sparse_encode")
        return *_gradients(ctx, vals_grad, *ctx.saved_tensors), None, None, None


def triton_topk_encode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    k: int,
    *,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest pre-activations of each sample, and which features they belong to.

    ``pre = x @ weight.T + bias``; ``indices[b]`` are the k features with the largest ``pre[b]``, exactly, and
    ``vals[b] = relu(pre[b, indices[b]])``. (TopK autoencoders: Gao et al., arXiv 2406.04093, section 2.3.) pre is
    computed by ``torch.nn.functional.linear``, so that autocast and torch's precision of float32 matmuls hold, for some
    samples at a time: 300 MiB of it, or 1024 samples. Its gradient is never dense.

    Args:
        x: ``[B, D]``, most often activations minus the decoder's bias.
        weight: ``[F, D]``, the encoder, as the weight of ``nn.Linear(D, F)``. Another layout than rows with unit stride
            costs a copy in the backward pass where x requires a gradient.
        bias: ``[F]``, or None.
        k: in ``[1, F]``. Beyond 256 the selection is that of ``torch.topk``, or ``torch.sort`` where F is small.
        relu: whether negative vals become zero. Their pairs then have no gradient.

    x, weight and bias are float16, bfloat16, float32 or float64 in any mixture, and are promoted to one dtype, or under
    autocast go to its dtype. Gradients are summed in float32, or float64 if any of the three is, and are rounded once.

    Returns:
        vals ``[B, k]`` in the dtype of pre, descending along rows, NaN first, differentiable once in x, weight and
        bias; and indices ``[B, k]`` int64. Of equal pre-activations the one with the lower feature comes first. The
        same inputs give the same bits. Tensors on a CPU go to `topk_encode`.

    Raises:
        TypeError: an argument is no tensor or has another dtype, or k is no int.
        ValueError: shapes or devices do not fit together, k is out of range, or sizes are too large for a launch:
            B * k, B * ceil(D / 32) or F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
    """
    check_encode_inputs(x, weight, bias, k)
    dtype = linear_dtype(x, weight, bias)
    if not runs_triton(x):
        return unchecked_topk_encode(x, weight, bias, k, relu, dtype)
    with torch.set_grad_enabled(needs_gradients(x, weight, bias)):
        return TopKEncode.apply(x, weight, bias, k, relu, dtype)


def triton_sparse_encode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    indices: torch.Tensor,
    *,
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Pre-activations at chosen features: ``pre[b, i] = <x[b], weight[indices[b, i]]> + bias[indices[b, i]]``.

    With ``offsets`` the pairs are ragged: those of sample b are ``indices[offsets[b]:offsets[b + 1]]``.

    Args:
        x: ``[B, D]``.
        weight: ``[F, D]``, the encoder. Rows with unit stride are read in place; another layout costs a copy of weight
            in the forward and in the backward pass.
        bias: ``[F]``, or None.
        indices: ``[B, K]``, or with offsets ``[P]``; int32 or int64 in ``[0, F)``. One out of range is not followed and
            gives NaN, also in its sample's gradient of x and in those of some row of weight and bias. Features may
            repeat.
        offsets: ``[B + 1]`` int32 or int64, ascending from 0 to P or less; pairs from ``offsets[B]`` on are spare room.
            What the result is where they do not ascend is undefined.

    x, weight and bias are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64 if any of
    the three is, and are rounded once, where they are stored.

    Returns:
        Of the shape of indices, zero in spare room, in the dtype that ``torch.nn.functional.linear`` would give: that
        of autocast, or the promoted one. Differentiable once in x, weight and bias. The same inputs give the same bits.
        Tensors on a CPU go to `sparse_encode`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, or are too large for a launch: P, B * ceil(D / 32) or
            F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
        IndexError: an index or offset is out of range and ``FLEX_SAE_CHECK_INDICES=1`` is in the environment, which
            costs a device synchronisation.
    """
    check_sparse_encode_inputs(x, weight, bias, indices, offsets)
    dtype = linear_dtype(x, weight, bias)
    if not (runs_triton(x) and runs_triton(indices)):
        return unchecked_sparse_encode(x, weight, bias, indices, offsets, dtype)
    with torch.set_grad_enabled(needs_gradients(x, weight, bias)):
        return SparseEncode.apply(x, weight, bias, indices, offsets, dtype)

"""The decode of sparse codes: sums of rows of a dictionary, weighted by a sample's vals.

With w_p = weight[indices[p]] and v_p = vals[p] of the pairs p of a sample b, and g_b the gradient of recon_b,

    recon_b = bias + sum_p v_p w_p,
    d weight[f] = sum over pairs p with indices[p] = f of v_p g_b,    d v_p = <w_p, g_b>,    d bias = sum_b g_b.

d weight is a sum over the pairs of each feature (segment_sum.py), which takes the dot products of d v on the way.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import check_decode_inputs
from .column_sum import sum_columns
from .dispatch import compute_dtype, device_of, needs_gradients, promoted_dtype, refuse_second_derivative, runs_triton
from .launch import cached_launch
from .ordering import order_pairs, samples_of
from .reference import unchecked_sae_decode
from .segment_sum import SegmentSum
from .tiles import (
    add_rows,
    cdiv,
    gather_columns,
    load_offsets,
    next_power_of_2,
    row_alignment,
    sample_tile,
    unit_stride_rows,
)

# Steps of a tile, as in the TopK forward pass
_BLOCK_K = 32
# Chunks of ragged pairs at most, and pairs of one at least. On an H100 (B=4096, P=64 B, F=65536, D=2304) the forward
# pass takes 0.383, 0.395, 0.413 ms with 256, 512, 1024 chunks where samples are of one length, and 0.534, 0.427, 0.423
# where lengths are proportional to 1 / rank; 0.351 with a fixed K.
_MAX_CHUNKS, _MIN_CHUNK = 512, 256
# Partial sums, and columns of them, that a program, four warps, adds at a time. Others were not tried.
_REDUCE_BLOCK_C, _REDUCE_BLOCK_D = 4, 512


@cached_launch
@triton.jit(do_not_specialize=["F", "weight_stride"])
def _decode_kernel(
    recon_ptr,  # [B, D]
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D], or None
    weight_stride,
    K,
    F,
    D: tl.constexpr,
    DOUBLE: tl.constexpr,  # sums are float64
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, _, cols, in_row = sample_tile(D, BLOCK_D)
    recon = _load_bias(bias_ptr, cols, in_row, tl.float64 if DOUBLE else tl.float32)
    recon = add_rows(
        recon, indices_ptr, weight_ptr, vals_ptr, b, cols, in_row, weight_stride, K, F, EVEN_K, ALIGN, BLOCK_K
    )
    tl.store(recon_ptr + b * D + cols, recon, mask=in_row)


@cached_launch
@triton.jit(do_not_specialize=["F", "P", "chunk", "chunks", "weight_stride"])
def _ragged_decode_kernel(
    recon_ptr,  # [B, D]
    partials_ptr,  # [2 * chunks, D]
    indices_ptr,  # [P]
    weight_ptr,  # [F, D]
    vals_ptr,  # [P]
    bias_ptr,  # [D], or None
    offsets_ptr,  # [B + 1]
    chunk_samples_ptr,  # [chunks + 1], the samples of pairs 0, chunk, 2 * chunk, ..
    weight_stride,
    F,
    P,
    chunk,
    chunks,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Parts of long samples, which take longest, go first.
    pid, _, cols, in_row = sample_tile(D, BLOCK_D)
    is_partial = pid < 2 * chunks
    if is_partial:
        # A chunk meets at most two long samples: one that reaches its start, one that reaches its end.
        # The latter is the sample of the next chunk's first pair.
        first = pid // 2 * chunk
        start, end = load_offsets(offsets_ptr, tl.load(chunk_samples_ptr + pid // 2 + pid % 2), P)
        active = (end - start > chunk) & ((pid % 2 == 0) | (start > first))
        start, end = tl.maximum(start, first), tl.minimum(end, first + chunk)
    else:
        start, end = load_offsets(offsets_ptr, pid - 2 * chunks, P)
        active = end - start <= chunk
    if active:
        # The bias of a long sample comes when its parts are added up.
        recon = tl.where(is_partial, 0.0, _load_bias(bias_ptr, cols, in_row, partials_ptr.dtype.element_ty))
        recon = add_rows(
            recon, indices_ptr + start, weight_ptr, vals_ptr + start, 0, cols, in_row, weight_stride,
            (end - start).to(tl.int32), F, False, ALIGN, BLOCK_K,
        )  # fmt: skip
        if is_partial:
            tl.store(partials_ptr + pid * D + cols, recon, mask=in_row)
        else:
            tl.store(recon_ptr + (pid - 2 * chunks) * D + cols, recon, mask=in_row)


@cached_launch
@triton.jit(do_not_specialize=["P", "chunk"])
def _sum_partials_kernel(
    recon_ptr,  # [B, D]
    partials_ptr,  # [2 * chunks, D]
    bias_ptr,  # [D], or None
    offsets_ptr,  # [B + 1]
    P,
    chunk,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, _, cols, in_row = sample_tile(D, BLOCK_D)
    start, end = load_offsets(offsets_ptr, b, P)
    if end - start > chunk:
        recon = _load_bias(bias_ptr, cols, in_row, partials_ptr.dtype.element_ty)
        first, last = start // chunk, (end - 1) // chunk
        for first_id in range(first, last + 1, BLOCK_C):
            chunk_id = first_id + tl.arange(0, BLOCK_C)
            row = 2 * chunk_id + tl.where((chunk_id == first) & (start % chunk > 0), 1, 0)
            mask = (chunk_id <= last)[:, None] & in_row[None, :]
            recon += tl.sum(tl.load(partials_ptr + (row * D)[:, None] + cols[None, :], mask=mask, other=0.0), axis=0)
        tl.store(recon_ptr + b * D + cols, recon, mask=in_row)


@triton.jit
def _load_bias(bias_ptr, cols, in_row, dtype: tl.constexpr):
    """Columns of the bias; zeros without one."""
    if bias_ptr is None:
        return tl.zeros(cols.shape, dtype)
    else:
        return tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)


def decode(
    indices: torch.Tensor,  # [B, K], or [P]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # as indices
    bias: Optional[torch.Tensor],  # [D]
    offsets: Optional[torch.Tensor],  # [B + 1]
    dtype: torch.dtype,
) -> torch.Tensor:
    """recon [B, D], summed in float32, or float64 if any input is, and rounded to ``dtype``."""
    (F, D), P = weight.shape, indices.numel()
    B = len(indices) if offsets is None else len(offsets) - 1
    indices, weight, vals = indices.contiguous(), unit_stride_rows(weight), vals.contiguous()
    bias = None if bias is None else bias.contiguous()
    accumulated = compute_dtype(weight, vals, bias)
    block_d = gather_columns(weight, accumulated)
    recon = weight.new_empty(B, D, dtype=dtype)
    with device_of(weight):
        if offsets is None:
            K = indices.shape[1]
            block_k = min(_BLOCK_K, next_power_of_2(K))
            _decode_kernel[(B, cdiv(D, block_d))](
                recon,
                indices,
                weight,
                vals,
                bias,
                weight.stride(0),
                K,
                F,
                D=D,
                DOUBLE=accumulated == torch.float64,
                EVEN_K=K % block_k == 0,
                ALIGN=row_alignment(weight, block_d // 32),
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                num_warps=1,
            )
        else:
            offsets, (chunk, chunks) = offsets.contiguous(), chunk_pairs(P)
            firsts = torch.arange(0, (chunks + 1) * chunk, chunk, device=offsets.device)  # beyond int32 at times
            chunk_samples = samples_of(firsts, offsets.long())
            partials = weight.new_empty(2 * chunks, D, dtype=accumulated)
            _ragged_decode_kernel[(2 * chunks + B, cdiv(D, block_d))](
                recon,
                partials,
                indices,
                weight,
                vals,
                bias,
                offsets,
                chunk_samples,
                weight.stride(0),
                F,
                P,
                chunk,
                chunks,
                D=D,
                ALIGN=row_alignment(weight, block_d // 32),
                BLOCK_K=_BLOCK_K,
                BLOCK_D=block_d,
                num_warps=1,
            )
            reduce_block_d = min(_REDUCE_BLOCK_D, next_power_of_2(D))
            _sum_partials_kernel[(B, cdiv(D, reduce_block_d))](
                recon, partials, bias, offsets, P, chunk, D=D, BLOCK_C=_REDUCE_BLOCK_C, BLOCK_D=reduce_block_d
            )
    return recon


def chunk_pairs(P: int) -> tuple[int, int]:
    """The pairs of a chunk, and the number of chunks."""
    chunk = max(_MIN_CHUNK, cdiv(P, _MAX_CHUNKS))
    return chunk, cdiv(P, chunk)


def _decode_backward(
    recon_grad: torch.Tensor,  # [B, D]
    indices: torch.Tensor,  # [B, K], or [P]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # as indices
    offsets: Optional[torch.Tensor],  # [B + 1]
    bias_dtype: torch.dtype,
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight, vals and bias, an empty tensor for one that is not needed."""
    F, D = weight.shape
    recon_grad, indices, vals = unit_stride_rows(recon_grad), indices.contiguous(), vals.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    dtype = compute_dtype(recon_grad)  # float64 if any input is
    weight_grad = weight.new_empty((F, D) if needs_weight else 0)
    vals_grad = vals.new_empty(vals.shape if needs_vals else 0)
    bias_grad = weight.new_empty(0, dtype=bias_dtype)
    with device_of(weight):
        one = weight.new_ones((), dtype=dtype)
        if needs_bias:
            bias_grad = sum_columns(recon_grad.contiguous(), one).to(bias_dtype)
        if needs_weight or needs_vals:
            pairs = order_pairs(indices, vals, F, dtype, offsets=offsets)
            out, dots = weight_grad if needs_weight else None, vals_grad if needs_vals else None
            sums = SegmentSum(pairs, one, D, out, dots, weight)
            sums.add(recon_grad)
            sums.finish()
            if needs_vals and offsets is not None:
                vals_grad.masked_fill_(pairs.spare, 0)
    return weight_grad, vals_grad, bias_grad


torch.library.define(
    add_op_namespace_prefix("sae_decode"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor? bias, Tensor? offsets, ScalarType dtype) -> Tensor",
)
torch.library.impl(add_op_namespace_prefix("sae_decode"), "default", decode)

torch.library.define(
    add_op_namespace_prefix("sae_decode_backward"),
    "(Tensor recon_grad, Tensor indices, Tensor weight, Tensor vals, Tensor? offsets, ScalarType bias_dtype,"
    " bool needs_weight, bool needs_vals, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("sae_decode_backward"), "default", _decode_backward)


@torch.library.register_fake(add_op_namespace_prefix("sae_decode"))
def _sae_decode_fake(indices, weight, vals, bias, offsets, dtype):
    B = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    return weight.new_empty((B, weight.shape[1]), dtype=dtype)


@torch.library.register_fake(add_op_namespace_prefix("sae_decode_backward"))
def _sae_decode_backward_fake(
    recon_grad, indices, weight, vals, offsets, bias_dtype, needs_weight, needs_vals, needs_bias
):
    return (
        weight.new_empty(weight.shape if needs_weight else 0),
        vals.new_empty(vals.shape if needs_vals else 0),
        weight.new_empty(weight.shape[1] if needs_bias else 0, dtype=bias_dtype),
    )


class SAEDecode(torch.autograd.Function):
    """See `triton_sae_decode`."""

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, offsets, dtype):
        ctx.save_for_backward(indices, weight, vals, offsets)
        ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
        return ops.sae_decode(indices, weight, vals, bias, offsets, dtype)

    @staticmethod
    def backward(ctx, recon_grad):
        refuse_second_derivative("triton_sae_decode")
        needs = ctx.needs_input_grad[1:4]
        grads = ops.sae_decode_backward(recon_grad, *ctx.saved_tensors, ctx.bias_dtype, *needs)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs)), None, None


def triton_sae_decode(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The reconstruction of a sparse autoencoder: ``recon[b] = bias + sum_i vals[b, i] * weight[indices[b, i]]``.

    With ``offsets`` the pairs are ragged, as of BatchTopK and JumpReLU autoencoders: those of sample b are
    ``offsets[b]:offsets[b + 1]`` of indices and vals.

    Args:
        indices: ``[B, K]``, or with offsets ``[P]``; int32 or int64, the active features of each sample, in
            ``[0, F)``. One out of range is not followed and makes its sample's reconstruction NaN, and the gradient of
            some row of weight. Features that repeat add up.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: as indices, the activations. One that is zero has a gradient all the same.
        bias: ``[D]``, or None.
        offsets: ``[B + 1]`` int32 or int64, ascending from 0 to P or less. A sample may have no pairs; those from
            ``offsets[B]`` on are spare room: ignored, with a gradient of zero. What the result is of other offsets is
            undefined.

    weight, vals and bias are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64 if any
    of the three is, and are rounded once, where they are stored.

    Returns:
        ``[B, D]`` in the promoted dtype of weight, vals and bias, differentiable once in these. The same inputs give
        the same bits. Tensors on a CPU go to `sae_decode`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, or are too large for a launch: B * K or P, B * ceil(D / 32)
            or F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
        IndexError: an index or offset is out of range and ``FLEX_SAE_CHECK_INDICES=1`` is in the environment, which
            costs a device synchronisation.
    """
    check_decode_inputs(indices, weight, vals, bias, offsets)
    dtype = promoted_dtype(weight, vals, bias)
    if not runs_triton(indices) or (offsets is not None and len(offsets) == 1):
        return unchecked_sae_decode(indices, weight, vals, bias, offsets, dtype)
    with torch.set_grad_enabled(needs_gradients(weight, vals, bias)):
        return SAEDecode.apply(indices, weight, vals, bias, offsets, dtype)

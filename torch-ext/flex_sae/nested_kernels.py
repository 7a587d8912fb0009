"""Nested losses: the decoder loss of several prefixes of a sample's features, forward and backward.

The first ends[b, l] features of sample b belong to level l. With w_i = weight[indices[b, i]], v_i = vals[b, i] and
g_l the gradient of loss_l,

    e_l = bias + sum_{i < ends[b, l]} v_i w_i - target_b,    loss_l = sum_b |e_l|^2 / (B D),

and with T_l = sum_{m >= l} (2 g_m / (B D)) e_m, and l(i) the first level that step i belongs to, the gradients are

    d weight[f] = sum over pairs (b, i) with indices[b, i] = f of v_i T_l(i),    d v_i = <w_i, T_l(i)>,
    d bias = sum_b T_0,    d target_b = -T_0.

The forward pass keeps the e_l. Between two ends T is constant, so d weight is the segment sum of TopK (segment_sum.py)
with L rows a sample.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import check_nested_inputs
from .column_sum import sum_columns
from .dispatch import compute_dtype, device_of, needs_gradients, refuse_second_derivative, runs_triton
from .launch import cached_launch
from .ordering import OrderedPairs, order_pairs
from .reference import unchecked_nested_sae_loss
from .segment_sum import SegmentSum
from .tiles import cdiv, gather_columns, load_pairs, next_power_of_2, row_alignment, sample_tile, unit_stride_rows

# Steps of a forward tile, as of TopK
_FORWARD_BLOCK_K = 32
# Bytes of a row of T that are summed at a time, so that the [L * B, columns] of a part can stay in the L2 cache.
_PART_BYTES = 1024
# Samples of a program, four warps, that adds up levels. On an H100 1 to 8 take the same time within 1% of a step; with
# 4 Triton 3.9 spills registers.
_SUFFIX_BLOCK_B = 2


@cached_launch
@triton.jit(do_not_specialize=["B", "F", "L", "weight_stride", "ends_stride"])
def _nested_forward_kernel(
    loss_ptr,  # [L, cdiv(D, BLOCK_D), B], this tile's share of each loss
    residuals_ptr,  # [L, B, D], e_l, or None
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D]
    target_ptr,  # [B, D]
    ends_ptr,  # [L], or [B, L]
    weight_stride,
    target_stride,
    ends_stride,  # 0 for ends [L]
    B,
    K,
    F,
    L,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, tile, cols, in_row = sample_tile(D, BLOCK_D)
    dtype: tl.constexpr = loss_ptr.dtype.element_ty

    recon = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    ends_ptr += b * ends_stride
    row, share = b, tile.to(tl.int64) * B + b
    level = 0
    stop = tl.load(ends_ptr)
    end = _clamped(stop, 0, K)
    steps = tl.arange(0, BLOCK_K)
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for first in range(0, K, BLOCK_K):
        weight_row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + weight_row[:, None] + cols[None, :], mask=mask, other=0.0)
        # Prefetch the next pairs.
        next_steps = steps + BLOCK_K
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, next_steps, K, F, dtype)
        added = val[:, None] * weight.to(dtype)
        # The levels that end in this tile
        while (level < L) & (end <= first + BLOCK_K):
            # An end out of order or out of range spoils its level and those behind it.
            recon = tl.where(stop == end, recon, float("nan"))
            prefix = recon + tl.sum(tl.where((steps < end)[:, None], added, 0.0), axis=0)
            residual = tl.where(in_row, prefix - target, 0.0)  # inf * 0 past the last column is NaN
            if residuals_ptr is not None:
                tl.store(residuals_ptr + row * D + cols, residual, mask=in_row)
            tl.store(loss_ptr + share, tl.sum(residual * residual) / B / D)
            level += 1
            row += B
            share += tl.num_programs(1) * B
            stop = tl.load(ends_ptr + level, mask=level < L, other=0)
            end = _clamped(stop, end, K)
        recon += tl.sum(added, axis=0)
        steps, feature, val, valid = next_steps, next_feature, next_val, next_valid


@triton.jit
def _clamped(stop, start, K):
    """An end, in [start, K] whatever it is."""
    return tl.minimum(tl.maximum(stop, start), K).to(tl.int32)


@cached_launch
@triton.jit(do_not_specialize=["ends_stride", "B", "K", "L"])
def _level_rows_kernel(
    rows_ptr,  # [B, K], l(i) * B + b, the row of T [L * B, D] for each step; the last level's beyond all ends
    ends_ptr,  # [L], or [B, L]
    ends_stride,  # 0 for ends [L]
    B,
    K,
    L,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows_ptr += row * K
    ends_ptr += row * ends_stride
    start = 0
    for level in range(L):
        end = _clamped(tl.load(ends_ptr + level), start, K)
        limit = tl.where(level == L - 1, K, end)
        for first in range(start, limit, BLOCK_K):
            steps = first + tl.arange(0, BLOCK_K)
            tl.store(rows_ptr + steps, row, mask=steps < limit)
        start = end
        row += B


@cached_launch
@triton.jit(do_not_specialize=["B", "L"])
def _suffix_sums_kernel(
    suffixes_ptr,  # [L * B, columns], T_l from first_col on; or None
    first_suffix_ptr,  # [B, D], T_0
    residuals_ptr,  # [L, B, D], e_l
    scales_ptr,  # [L], 2 g_l / (B D)
    B,
    L,
    first_col,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    place = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    cols = first_col + place
    exists = (b < B) & (cols < D) & (place < COLUMNS)
    total = tl.zeros([BLOCK_B, BLOCK_D], residuals_ptr.dtype.element_ty)
    for behind in range(L):
        level = L - 1 - behind
        row = level.to(tl.int64) * B + b
        total += tl.load(scales_ptr + level) * tl.load(residuals_ptr + row * D + cols, mask=exists, other=0.0)
        if suffixes_ptr is not None:
            tl.store(suffixes_ptr + row * COLUMNS + place, total, mask=exists)
    tl.store(first_suffix_ptr + b * D + cols, total, mask=exists)


def _nested_forward(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    ends: torch.Tensor,  # [L], or [B, L]
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses [L], and e_l [L, B, D] if they are needed, else an empty tensor."""
    (B, K), (F, D), L = indices.shape, weight.shape, ends.shape[-1]
    dtype = compute_dtype(weight, vals, bias, target)
    weight, target, ends = unit_stride_rows(weight), unit_stride_rows(target), ends.contiguous()
    block_k, block_d = min(_FORWARD_BLOCK_K, next_power_of_2(K)), gather_columns(weight, dtype)
    tiles = cdiv(D, block_d)
    shares = weight.new_empty(L, tiles * B, dtype=dtype)
    residuals = weight.new_empty((L, B, D) if needs_grad else 0, dtype=dtype)
    with device_of(weight):
        _nested_forward_kernel[(B, tiles)](
            shares,
            residuals if needs_grad else None,
            indices.contiguous(),
            weight,
            vals.contiguous(),
            bias.contiguous(),
            target,
            ends,
            weight.stride(0),
            target.stride(0),
            L if ends.dim() == 2 else 0,
            B,
            K,
            F,
            L,
            D=D,
            EVEN_K=K % block_k == 0,
            ALIGN=row_alignment(weight, block_d // 32),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
    return shares.sum(1), residuals


def _order_levels(
    indices: torch.Tensor,  # [B, K]
    vals: torch.Tensor,  # [B, K]
    ends: torch.Tensor,  # [L], or [B, L]
    L: int,
    F: int,
    dtype: torch.dtype,
) -> tuple[OrderedPairs, torch.Tensor]:
    """The pairs ordered by feature, each with its row of T [L * B, D]; and the steps behind the last end, [K] or
    [B, K], which belong to no level and count nothing, whatever they hold."""
    B, K = indices.shape
    rows = torch.empty_like(indices, dtype=torch.int32)
    _level_rows_kernel[(B,)](rows, ends, L if ends.dim() == 2 else 0, B, K, L, BLOCK_K=_FORWARD_BLOCK_K, num_warps=1)
    outside = torch.arange(K, device=ends.device) >= ends[..., -1:]
    indices, vals = indices.masked_fill(outside, 0), vals.masked_fill(outside, 0)
    return order_pairs(indices, vals, F, dtype, pair_samples=rows), outside


def _suffix_sums(
    suffixes: Optional[torch.Tensor],  # [L * B, columns]
    first_suffix: torch.Tensor,  # [B, D]
    residuals: torch.Tensor,  # [L, B, D]
    scales: torch.Tensor,  # [L]
    first_column: int = 0,
) -> None:
    """Write the T_l of some columns to ``suffixes``, and those of T_0; without ``suffixes`` all of T_0."""
    L, B, D = residuals.shape
    columns = D if suffixes is None else suffixes.shape[1]
    block_d = min(_PART_BYTES // scales.itemsize, next_power_of_2(D))
    _suffix_sums_kernel[(cdiv(B, _SUFFIX_BLOCK_B), cdiv(columns, block_d))](
        suffixes,
        first_suffix,
        residuals,
        scales,
        B,
        L,
        first_column,
        D=D,
        COLUMNS=columns,
        BLOCK_B=_SUFFIX_BLOCK_B,
        BLOCK_D=block_d,
    )


def _nested_backward(
    losses_grad: torch.Tensor,  # [L]
    residuals: torch.Tensor,  # [L, B, D], e_l
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    ends: torch.Tensor,  # [L], or [B, L]
    bias_dtype: torch.dtype,
    target_dtype: torch.dtype,
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
    needs_target: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight, vals, bias and target, an empty tensor for one that is not needed."""
    (L, B, D), F, dtype = residuals.shape, len(weight), residuals.dtype
    # What comes out of saved_tensors may have any strides.
    residuals, indices, vals, ends = (t.contiguous() for t in (residuals, indices, vals, ends))
    weight_grad = weight.new_empty((F, D) if needs_weight else 0)
    vals_grad = vals.new_empty(vals.shape if needs_vals else 0)
    bias_grad = weight.new_empty(0, dtype=bias_dtype)
    target_grad = weight.new_empty(0, dtype=target_dtype)
    scales = (losses_grad * (2 / (B * D))).contiguous()
    # A single level needs no sums: its residual is T_0 but for the scale, which readers apply.
    first_suffix, scale = (residuals[0], scales[0]) if L == 1 else (residuals.new_empty(B, D), scales.new_ones(()))
    with device_of(weight):
        if needs_weight or needs_vals:
            pairs, outside = _order_levels(indices, vals, ends, L, F, dtype)
            out, dots = weight_grad if needs_weight else None, vals_grad if needs_vals else None
            columns = min(_PART_BYTES // scale.itemsize, next_power_of_2(D))
            sums = SegmentSum(pairs, scale, D, out, dots, weight, part_columns=None if L == 1 else columns)
            if L == 1:
                sums.add(first_suffix)
            else:
                suffixes = residuals.new_empty(L * B, columns)
                for first_column in range(0, D, columns):
                    _suffix_sums(suffixes, first_suffix, residuals, scales, first_column)
                    sums.add(suffixes, first_column)
            sums.finish()
            if needs_vals:
                vals_grad.masked_fill_(outside, 0)
        elif L > 1:
            _suffix_sums(None, first_suffix, residuals, scales)
        if needs_bias:
            bias_grad = sum_columns(first_suffix, scale).to(bias_dtype)
        if needs_target:
            target_grad = (first_suffix * -scale).to(target_dtype)
    return weight_grad, vals_grad, bias_grad, target_grad


torch.library.define(
    add_op_namespace_prefix("nested_forward"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor bias, Tensor target, Tensor ends, bool needs_grad)"
    " -> (Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("nested_forward"), "default", _nested_forward)

torch.library.define(
    add_op_namespace_prefix("nested_backward"),
    "(Tensor losses_grad, Tensor residuals, Tensor indices, Tensor weight, Tensor vals, Tensor ends,"
    " ScalarType bias_dtype, ScalarType target_dtype, bool needs_weight, bool needs_vals, bool needs_bias,"
    " bool needs_target) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("nested_backward"), "default", _nested_backward)


@torch.library.register_fake(add_op_namespace_prefix("nested_forward"))
def _nested_forward_fake(indices, weight, vals, bias, target, ends, needs_grad):
    dtype, L = compute_dtype(weight, vals, bias, target), ends.shape[-1]
    return (
        weight.new_empty(L, dtype=dtype),
        weight.new_empty((L, *target.shape) if needs_grad else 0, dtype=dtype),
    )


@torch.library.register_fake(add_op_namespace_prefix("nested_backward"))
def _nested_backward_fake(losses_grad, residuals, indices, weight, vals, ends, bias_dtype, target_dtype, *needs):
    needs_weight, needs_vals, needs_bias, needs_target = needs
    return (
        weight.new_empty(weight.shape if needs_weight else 0),
        vals.new_empty(vals.shape if needs_vals else 0),
        weight.new_empty(weight.shape[1] if needs_bias else 0, dtype=bias_dtype),
        weight.new_empty(residuals.shape[1:] if needs_target else 0, dtype=target_dtype),
    )


class NestedSAELoss(torch.autograd.Function):
    """The two ops above as one differentiable function, see `triton_nested_sae_loss`."""

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, target, ends, needs_grad):
        losses, residuals = ops.nested_forward(indices, weight, vals, bias, target, ends, needs_grad)
        ctx.save_for_backward(residuals, indices, weight, vals, ends)
        ctx.dtypes = bias.dtype, target.dtype
        return losses

    @staticmethod
    def backward(ctx, losses_grad):
        refuse_second_derivative("triton_nested_sae_loss")
        needs = ctx.needs_input_grad[1:5]
        grads = ops.nested_backward(losses_grad, *ctx.saved_tensors, *ctx.dtypes, *needs)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs)), None, None


def triton_nested_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Mean squared errors of the reconstructions from several prefixes of each sample's features, fused.

    ``losses[l] = mean over b, d of (bias + sum_{i < ends[b, l]} vals[b, i] * weight[indices[b, i]] - target[b])[d] **
    2``: what SAEs of nested budgets are trained with, as a sum that the caller weighs. A budget for all samples is an
    end for all (HierarchicalTopK's set of budgets, arXiv 2505.24473, section 3; Multi-TopK, Gao et al., arXiv
    2406.04093); Matryoshka SAEs (Bussmann et al., arXiv 2503.17547), whose prefixes are of the dictionary, have
    ends for each sample once its features are sorted by index.

    Args:
        indices: ``[B, K]`` int32 or int64, the active features of each sample, in ``[0, F)``, in the order that ends
            count in. One out of range is not followed and makes all losses that count it NaN.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: ``[B, K]``, the activations.
        bias: ``[D]``.
        target: ``[B, D]``, what to reconstruct.
        ends: ``[L]``, or ``[B, L]`` for ends of each sample; int32 or int64, on the same device, ascending along L from
            0 or more to K or less. 0 is the bias alone; equal ends are levels of their own. At an end below the one
            before it or out of range, that loss and those behind it are NaN, and with them the sample's gradients.

    weight, vals, bias and target are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64
    if any of the four is, and are rounded once, where they are stored.

    Returns:
        ``[L]`` float32 (float64 if any input is), differentiable once in weight, vals, bias and target. What stands
        behind a sample's last end is ignored, with a gradient of zero. The same inputs give the same bits. It keeps
        ``[L, B, D]`` numbers for the backward pass, which takes ``[B, D]`` and ``[L, B, 256]`` more where L > 1.
        Tensors on a CPU go to `nested_sae_loss`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, or are too large for a launch: B * K, B * L, B * ceil(D / 32)
            or F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
        IndexError: an index or an end is out of range, or ends do not ascend, and ``FLEX_SAE_CHECK_INDICES=1`` is in
            the environment, which costs a device synchronisation.
    """
    check_nested_inputs(indices, weight, vals, bias, target, ends)
    if not runs_triton(indices):
        return unchecked_nested_sae_loss(indices, weight, vals, bias, target, ends)
    needs_grad = needs_gradients(weight, vals, bias, target)
    with torch.set_grad_enabled(needs_grad):
        return NestedSAELoss.apply(indices, weight, vals, bias, target, ends, needs_grad)

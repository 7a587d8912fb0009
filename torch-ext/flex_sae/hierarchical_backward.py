"""The two algorithms for the gradients of weight and vals of the HierarchicalTopK loss (hierarchical_kernels.py).

Both walk a sample's steps from the last to the first, from the last residual that the forward pass has kept:

    r_{i-1} = r_i - v_i w_i,    S_i = S_{i+1} + r_i,    d weight[indices_i] += c_b v_i S_i,    d v_i = c_b <w_i, S_i>.

Where residuals shrink along the steps, this adds small numbers first.

Atomic additions to the rows of d weight are the faster algorithm, but their order, and with it the last bits, changes
from run to run. A feature of many pairs has several rows for them (replicas.py).

The ordered algorithm writes the S_i of some columns to scratch memory, at their pairs' places in the order of features,
and sums each feature's segment (segment_sum.py), some columns at a time. It serves
torch.use_deterministic_algorithms(True), and gradients of a narrower dtype than the sums, which every atomic addition
would round.
"""

import math
from typing import Optional

import torch
import triton
import triton.language as tl

from .launch import cached_launch
from .ordering import order_pairs
from .replicas import Replicas, replica_row
from .segment_sum import SegmentSum
from .tiles import cdiv, load_pairs, next_power_of_2, row_alignment, sample_tile

# Steps and columns of a tile that adds to d weight atomically. Of 4 to 32 steps and 32 to 128 columns on an H200, the
# best or within 2% of it at B=4096 and 8192, K=32 and 128: with more columns d weight leaves the L2 cache, with fewer
# the work on indices counts.
_ATOMIC_BLOCK_K, _ATOMIC_BLOCK_D = 8, 64
# Half as many columns where those of all features, of weight and of d weight, are more bytes than the L2 cache keeps.
# On an H200 (K=64, D=2304) a float32 step then takes 13% less time at F=131072 and B=16384, 7% less at B=8192, where it
# is 6% at F=100000 (51 MB) but 2% more at 70000 (36 MB).
_L2_BYTES = 40 * 2**20
# A tile that writes to scratch takes this much of a row: 64 columns of float32, 128 of float16 (bfloat16 weight).
_SCRATCH_ROW_BYTES = 256
# Steps of such a tile of up to 64 columns, and of 128. Of 8 to 32 on an H200 a step is the fastest for float32, by 4%
# (K=128); of 2 to 16 for bfloat16, by 0.6%.
_SCRATCH_BLOCK_K, _WIDE_SCRATCH_BLOCK_K = 32, 4
# Bytes of scratch for each sample, or a tile's row for each pair if that is more: 256 MiB at B=4096. It counts samples
# and not bytes in all because the width of scratch decides the shape of kernels, which B must not. Less means more
# launches: with half of it, and sums of d vals that were zeroed first, a bfloat16 step took 2 to 4% longer on an H100.
_SCRATCH_BYTES = 2**16


@cached_launch
@triton.jit(do_not_specialize=["F", "weight_stride"])
def _hierarchical_atomic_kernel(
    weight_sums_ptr,  # [F + replicas, D], zeros to add to, or None
    vals_sums_ptr,  # [B, K], zeros to add to, or None
    table_ptr,  # the table of replicas, or None
    residual_ptr,  # [B, D], r_{K-1}
    scale_ptr,  # 0-dim, c_b without the sample's weight
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    sample_weight_ptr,  # [B], or None for weights of 1
    weight_stride,
    K,
    F,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, _, cols, in_row = sample_tile(D, BLOCK_D)
    dtype: tl.constexpr = scale_ptr.dtype.element_ty

    scale = tl.load(scale_ptr)
    if sample_weight_ptr is not None:
        scale *= tl.load(sample_weight_ptr + b)
    residual = tl.load(residual_ptr + b * D + cols, mask=in_row, other=0.0)
    suffix = tl.zeros([BLOCK_D], dtype)
    any_replicas = False
    if weight_sums_ptr is not None:
        any_replicas = tl.load(table_ptr + F) > 0
    steps = K - 1 - tl.arange(0, BLOCK_K)  # from the last to the first
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0).to(dtype)
        # Prefetch the next pairs.
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps - BLOCK_K, K, F, dtype)

        # Folding the carry into the scans, as below, takes 4% longer here (H100, K=128), where steps lie across lanes.
        removed = val[:, None] * weight
        residuals = residual[None, :] - (tl.cumsum(removed, axis=0) - removed)
        suffixes = suffix[None, :] + tl.cumsum(residuals, axis=0)
        residual -= tl.sum(removed, axis=0)
        suffix += tl.sum(residuals, axis=0)

        if weight_sums_ptr is not None:
            sums_row = feature
            if any_replicas:
                sums_row = replica_row(table_ptr, b, feature, valid, F)
            weight_sums_ptrs = weight_sums_ptr + (sums_row * D)[:, None] + cols[None, :]
            contribution = (scale * val)[:, None] * suffixes
            tl.atomic_add(weight_sums_ptrs, contribution, mask=valid[:, None] & in_row[None, :], sem="relaxed")
        if vals_sums_ptr is not None:
            dot = scale * tl.sum(weight * suffixes, axis=1)
            tl.atomic_add(vals_sums_ptr + b * K + steps, dot, mask=(steps >= 0) | EVEN_K, sem="relaxed")

        steps -= BLOCK_K
        feature, val, valid = next_feature, next_val, next_valid


@cached_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride", "scratch_stride", "first_tile"])
def _hierarchical_scratch_kernel(
    scratch_ptr,  # [B * K, scratch_stride], for the S_i of the launch's columns over their sample's scale, or None
    vals_sums_ptr,  # [tiles, B, K], accumulated over the launches, or None
    row_scales_ptr,  # [B], or None for scales of 1
    slots_ptr,  # [B, K], the row of scratch for each pair, or None
    residual_ptr,  # [B, D], r_{K-1}
    scale_ptr,  # 0-dim, c_b without the sample's weight
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    sample_weight_ptr,  # [B], or None for weights of 1
    weight_stride,
    scratch_stride,
    B,
    K,
    F,
    first_tile,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Sample fastest: all samples walk the same columns of weight while they sit in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scratch_cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = first_tile * BLOCK_D + scratch_cols
    in_row = (cols < D) | (D % BLOCK_D == 0)
    dtype: tl.constexpr = scale_ptr.dtype.element_ty

    scale = tl.load(scale_ptr)
    if sample_weight_ptr is not None:
        scale *= tl.load(sample_weight_ptr + b)
    inverse_scale = 1.0 if row_scales_ptr is None else 1.0 / tl.load(row_scales_ptr + b)
    residual = tl.load(residual_ptr + b * D + cols, mask=in_row, other=0.0)
    suffix = tl.zeros([BLOCK_D], dtype)
    position = tl.arange(0, BLOCK_K)
    first, last = (position == 0)[:, None], (position == BLOCK_K - 1)[:, None]
    steps = K - 1 - position  # from the last to the first
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0).to(dtype)
        exists = (steps >= 0) | EVEN_K
        pair = b * K + steps
        if vals_sums_ptr is not None:
            vals_sums_ptrs = vals_sums_ptr + tile.to(tl.int64) * B * K + pair
            dots_before = tl.load(vals_sums_ptrs, mask=tl.where(first_tile > 0, exists, False), other=0.0)
        # Prefetch the next pairs.
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps - BLOCK_K, K, F, dtype)

        # The carry is folded into the first row of each scan, which saves an addition per element.
        removed = val[:, None] * weight
        residuals_before = tl.cumsum(tl.where(first, residual[None, :] - removed, -removed), axis=0)
        residuals = residuals_before + removed
        suffixes = tl.cumsum(tl.where(first, suffix[None, :] + residuals, residuals), axis=0)
        residual = tl.sum(tl.where(last, residuals_before, 0.0), axis=0)
        suffix = tl.sum(tl.where(last, suffixes, 0.0), axis=0)

        if scratch_ptr is not None:
            slot = tl.load(slots_ptr + pair, mask=exists, other=0).to(tl.int64)
            slot_row = tl.multiple_of(slot * scratch_stride, ALIGN)
            scratch_ptrs = scratch_ptr + slot_row[:, None] + scratch_cols[None, :]
            # The L2 cache is for weight.
            tl.store(scratch_ptrs, suffixes * inverse_scale, mask=exists[:, None], eviction_policy="evict_first")
        if vals_sums_ptr is not None:
            dots = scale * tl.sum(weight * suffixes, axis=1)
            tl.store(vals_sums_ptrs, dots_before + dots, mask=exists)

        steps -= BLOCK_K
        feature, val, valid = next_feature, next_val, next_valid


def atomic_gradients(
    residual: torch.Tensor,  # [B, D], r_{K-1}
    scale: torch.Tensor,  # 0-dim, c_b without the sample's weight
    counts: torch.Tensor,  # [F]
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D], of the dtype of scale
    vals: torch.Tensor,  # [B, K]
    sample_weight: Optional[torch.Tensor],  # [B], of the dtype of scale
    needs_weight: bool,
    needs_vals: bool,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The gradients of weight and vals by atomic additions, None for one that is not needed."""
    (B, K), (F, D) = vals.shape, weight.shape
    replicas = Replicas(counts.contiguous(), B, K, D, weight.dtype) if needs_weight else None
    vals_sums = scale.new_zeros(B, K) if needs_vals else None
    block_k = min(_ATOMIC_BLOCK_K, next_power_of_2(K))
    leaves_cache = 2 * F * _ATOMIC_BLOCK_D * weight.element_size() > _L2_BYTES
    block_d = min(_ATOMIC_BLOCK_D // 2 if leaves_cache else _ATOMIC_BLOCK_D, next_power_of_2(D))
    _hierarchical_atomic_kernel[(B, cdiv(D, block_d))](
        replicas.rows if needs_weight else None,
        vals_sums,
        replicas.table if needs_weight else None,
        residual,
        scale,
        indices,
        weight,
        vals,
        sample_weight,
        weight.stride(0),
        K,
        F,
        D=D,
        EVEN_K=K % block_k == 0,
        # Four columns a lane: then 16 lanes cover 64 columns, and two rows share the shuffles of the dot products.
        ALIGN=row_alignment(weight, 4),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=1,
    )
    return replicas.sum() if needs_weight else None, vals_sums


def ordered_gradients(
    residual: torch.Tensor,  # [B, D], r_{K-1}
    scale: torch.Tensor,  # 0-dim, c_b without the sample's weight
    row_scales: torch.Tensor,  # [B], or empty where scratch is not narrow
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    sample_weight: Optional[torch.Tensor],  # [B], of the dtype of scale
    needs_weight: bool,
    needs_vals: bool,
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The gradients of weight and vals through scratch, None for one that is not needed."""
    (B, K), (F, D) = vals.shape, weight.shape
    narrow = narrow_scratch(weight, scale.dtype)
    row_scales = row_scales.contiguous() if narrow else None
    itemsize = 2 if narrow else scale.itemsize
    block_d = min(_SCRATCH_ROW_BYTES // itemsize, next_power_of_2(D))
    block_k = min(_SCRATCH_BLOCK_K if block_d <= 64 else _WIDE_SCRATCH_BLOCK_K, next_power_of_2(K))
    # The widest power of two that fits, or all columns
    columns = max(block_d, _SCRATCH_BYTES // (K * itemsize))
    columns = min(1 << (columns.bit_length() - 1), cdiv(D, block_d) * block_d)
    vals_sums = scale.new_empty(columns // block_d, B, K) if needs_vals else None
    weight_grad = scratch = slots = None
    if needs_weight:
        weight_grad = weight.new_empty(F, D)
        coef_scales = row_scales
        if sample_weight is not None:
            coef_scales = sample_weight if row_scales is None else row_scales * sample_weight
        pairs = order_pairs(indices, vals, F, scale.dtype, coef_scales, with_slots=True)
        sums, slots = SegmentSum(pairs, scale, D, weight_grad, part_columns=columns), pairs.slots
        scratch = scale.new_empty(B * K, columns, dtype=torch.float16 if narrow else scale.dtype)
    for first_column in range(0, D, columns):
        _hierarchical_scratch_kernel[(B, cdiv(min(columns, D - first_column), block_d))](
            scratch,
            vals_sums,
            row_scales,
            slots,
            residual,
            scale,
            indices,
            weight,
            vals,
            sample_weight,
            weight.stride(0),
            columns,
            B,
            K,
            F,
            first_column // block_d,
            D=D,
            EVEN_K=K % block_k == 0,
            ALIGN=row_alignment(weight, block_d // 32),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
        if needs_weight:
            sums.add(scratch, first_column)
    if needs_weight:
        sums.finish()
    return weight_grad, vals_sums.sum(0) if needs_vals else None


def narrow_scratch(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether scratch is float16: a gradient that keeps 8 bits, bfloat16, needs no more than 11 bits of S_i."""
    return weight.dtype == torch.bfloat16 and dtype == torch.float32


def row_scales_of(
    shares: torch.Tensor,  # [tiles, B], of the loss
    K: int,
    D: int,
) -> torch.Tensor:  # [B]
    """For each sample a scale that brings its S_i to at most 2**15, unless its loss overflows or vanishes: by
    Cauchy-Schwarz |S_i| <= sum_j |r_j| <= sqrt(K sum_j |r_j|^2)."""
    tiles, B = shares.shape
    # What a tile's share lost to underflow is less than the smallest normal number. One that overflowed is infinite.
    limits = torch.finfo(shares.dtype)
    losses = shares.sum(0).clamp(tiles * limits.tiny, limits.max)
    return losses.sqrt() * (math.sqrt(B * K * D * K) / 2**15)

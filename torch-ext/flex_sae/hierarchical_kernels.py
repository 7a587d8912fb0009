"""HierarchicalTopK: the decoder loss of every prefix of a sample's features at once, forward and backward.

With w_i = weight[indices[b, i]] and v_i = vals[b, i] of one sample b, the prefix residuals and their suffix sums are

    r_j = bias - target_b + sum_{i <= j} v_i w_i,    S_i = sum_{j >= i} r_j,    i, j = 0..K-1,

    loss = sum_{b, j} |r_j|^2 / (B K D),

and with c = grad_out * 2 / (B K D) the gradients are

    d weight[f] = sum over pairs (b, i) with indices[b, i] = f of c v_i S_i,    d v_i = c <w_i, S_i>,
    d bias = c sum_b S_0,    d target_b = -c S_0.

The forward pass keeps S_0. From it the backward pass walks the steps in the order of the forward pass:
r_i = r_{i-1} + v_i w_i and S_{i+1} = S_i - r_i.

d weight comes about in one of two ways. Atomic additions to its rows are the faster one in float32 and float64, but
their order, and with it the last bits, changes from run to run; a feature of many samples has several rows for them
(copies.py). The ordered way writes the S_i of some columns to scratch memory, in the order of their features, and sums
them there (pairs.py), columns after columns. It serves torch.use_deterministic_algorithms(True) and gradients of a
narrower dtype than the one that is computed in, which atomic additions would round again and again.
"""

import math

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import (
    beside,
    cdiv,
    check_inputs,
    compute_dtype,
    device_of,
    lane_columns,
    mark,
    new_empty,
    next_power_of_2,
    no_grad_in_inference_mode,
    refuse_second_derivative,
    runs_triton,
    savable,
    select,
    tile_columns,
    unit_stride_rows,
)
from .columns import sum_columns
from .copies import count_pairs, needs_copies, new_plan, new_rows, plan_copies, row_to_add_to, sum_copies
from .launch import quick_launch, wait_for_memory
from .pairs import (
    OrderedPairs,
    finish,
    gather_pairs,
    load_pairs,
    new_pairs,
    new_pieces,
    new_sums,
    pairs_summer,
    sort_pairs,
)

# Steps of a forward tile. Of 4 to 32 on an H200 (B=4096, F=65536, D=2304) the best at K=128, by 9% in float32 and by
# 30% in bfloat16.
_FORWARD_BLOCK_K = 32
# A tile that writes to scratch takes this much of a row: 64 columns of float32, 128 of float16 (bfloat16 weight).
_SCRATCH_ROW_BYTES = 256
# Steps of such a tile of up to 64 columns, and of 128. Of 8 to 32 on an H200 a step is the fastest for float32, by 4%
# (K=128); of 2 to 16 for bfloat16, by 0.6%.
_SCRATCH_BLOCK_K, _WIDE_SCRATCH_BLOCK_K = 32, 4
# Steps and columns of a tile that adds to d weight atomically. Of 4 to 32 steps and 32 to 128 columns on an H200, the
# best or within 2% of it at B=4096 and 8192, K=32 and 128: with more columns d weight leaves the L2 cache, with fewer
# the work on indices counts. Samples at a time matter no less than instructions: a form with half as many of these took
# 14% longer at K=128 with 36 samples a multiprocessor than with 16 (more tiles of columns are then on their way).
_ATOMIC_BLOCK_K, _ATOMIC_BLOCK_D = 8, 64
# Half as many columns where those of all features, of weight and of d weight, are more bytes than the L2 cache keeps
# and features have two pairs or more. On an H200 (K=64, D=2304) a float32 step then takes 13% less time at F=131072 and
# B=16384, 7% less at B=8192, where it is 6% at F=100000 (51 MB) but 2% more at 70000 (36 MB). With one pair a feature
# it would be 3% more. B decides between these two alone: one batch at most waits for a compiler.
_L2_BYTES = 40 * 2**20
# Bytes of scratch for each sample, or a tile's row for each pair if that is more: 128 MiB at B=4096. It counts samples
# and not bytes in all because the width of scratch decides the shape of kernels, which B must not. Less means more
# launches.
_SCRATCH_BYTES = 2**15


@quick_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride", "counts"])
def _hierarchical_forward_kernel(
    loss_ptr,  # [cdiv(D, BLOCK_D), B], this tile's share of the loss
    suffix_ptr,  # [B, D], S_0
    plan_ptr,  # the plan of copies, or None
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D]
    target_ptr,  # [B, D]
    weight_stride,
    target_stride,
    B,
    K,
    F,
    D,
    counts,  # whether there is anything to plan
    NEEDS_SUFFIX: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    # Sample fastest: all samples walk the same columns of weight while they sit in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    D = D // ALIGN * ALIGN  # as it was, but now the compiler knows: it splits accesses whose mask may end anywhere
    in_row = (cols < D) | EVEN_D
    dtype: tl.constexpr = loss_ptr.dtype.element_ty

    if plan_ptr is not None:
        count_pairs(plan_ptr, indices_ptr, b, tile, K, F, counts, BLOCK_K)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    residual = bias - target
    suffix = tl.zeros([BLOCK_D], dtype)
    squares = tl.zeros([BLOCK_D], dtype)
    steps = tl.arange(0, BLOCK_K)
    first, last = (steps == 0)[:, None], (steps == BLOCK_K - 1)[:, None]
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
        # The next pairs are on their way before these rows are used.
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps + BLOCK_K, K, F, dtype)

        added = val[:, None] * weight.to(dtype)
        residuals = tl.cumsum(tl.where(first, residual[None, :] + added, added), axis=0)
        residual = tl.sum(tl.where(last, residuals, 0.0), axis=0)
        if not EVEN_K:
            residuals = tl.where((steps < K)[:, None], residuals, 0.0)
        suffix += tl.sum(residuals, axis=0)
        squares += tl.sum(residuals * residuals, axis=0)

        steps += BLOCK_K
        feature, val, valid = next_feature, next_val, next_valid

    if NEEDS_SUFFIX:
        tl.store(suffix_ptr + b * D + cols, suffix, mask=in_row)
    squares = tl.where(in_row, squares, 0.0)  # where an infinite val has made zeros NaN
    tl.store(loss_ptr + tile.to(tl.int64) * B + b, tl.sum(squares) / (tl.full([], 1.0, dtype) * B * K * D))


@quick_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride", "scratch_stride", "first_tile"])
def _hierarchical_backward_kernel(
    weight_sums_ptr,  # [F + copies, D], zeros to add to, or None
    plan_ptr,  # the plan of copies, or None
    scratch_ptr,  # [B * K, scratch_stride], for the S_i of the launch's columns in units, or None
    slots_ptr,  # [B, K], the row of scratch for each pair
    units_ptr,  # [B], or None for units of 1
    vals_sums_ptr,  # [B, K], zeros to add to; unless ATOMIC [tiles, B, K], to which launches add in turn; or None
    suffix_ptr,  # [B, D], S_0
    scale_ptr,  # 0-dim, c
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D]
    target_ptr,  # [B, D]
    weight_stride,
    target_stride,
    scratch_stride,
    B,
    K,
    F,
    D,
    first_tile,
    ATOMIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    # Sample fastest: all samples walk the same columns of weight and d weight while they sit in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scratch_cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = first_tile * BLOCK_D + scratch_cols
    D = D // ALIGN * ALIGN  # as it was, but now the compiler knows: it splits accesses whose mask may end anywhere
    in_row = (cols < D) | EVEN_D
    dtype: tl.constexpr = scale_ptr.dtype.element_ty

    scale = tl.load(scale_ptr)
    per_unit = 1.0 if units_ptr is None else 1.0 / tl.load(units_ptr + b)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    residual = bias - target
    suffix = tl.load(suffix_ptr + b * D + cols, mask=in_row, other=0.0)
    any_heavy = False
    if weight_sums_ptr is not None:
        any_heavy = tl.load(plan_ptr + F) > 0
    # Compiled with and without copies: looking for them costs uniform batches up to 6%.
    for HAS_COPIES in tl.static_range(2 if weight_sums_ptr is not None else 1):
        if any_heavy == HAS_COPIES:
            steps = tl.arange(0, BLOCK_K)
            first, last = (steps == 0)[:, None], (steps == BLOCK_K - 1)[:, None]
            feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
            for _ in range(0, K, BLOCK_K):
                row = tl.multiple_of(feature * weight_stride, ALIGN)
                mask = (valid | EVEN_K)[:, None] & in_row[None, :]
                weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0).to(dtype)
                # The next pairs are on their way before these rows are used.
                next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps + BLOCK_K, K, F, dtype)

                # S_i = S_0 - sum_{j < i} r_j. A reversed scan would shuffle every element across the warp.
                added = val[:, None] * weight
                if ATOMIC:
                    residuals = residual[None, :] + tl.cumsum(added, axis=0)
                    suffixes = suffix[None, :] - (tl.cumsum(residuals, axis=0) - residuals)
                    residual += tl.sum(added, axis=0)
                    suffix -= tl.sum(residuals, axis=0)
                else:
                    # The same with fewer additions where a lane has all steps of its columns. Where steps lie across
                    # lanes it is up to 5% slower.
                    residuals = tl.cumsum(tl.where(first, residual[None, :] + added, added), axis=0)
                    before = tl.cumsum(tl.where(first, residuals - suffix[None, :], residuals), axis=0)
                    suffixes = residuals - before
                    residual = tl.sum(tl.where(last, residuals, 0.0), axis=0)
                    suffix = -tl.sum(tl.where(last, before, 0.0), axis=0)

                exists = (steps < K) | EVEN_K
                pair = b * K + steps
                if weight_sums_ptr is not None:
                    contribution = (scale * val)[:, None] * suffixes
                    sums_row = (row_to_add_to(plan_ptr, b, feature, valid, F) if HAS_COPIES else feature) * D
                    weight_sums_ptrs = weight_sums_ptr + sums_row[:, None] + cols[None, :]
                    valid_in_row = valid[:, None] & in_row[None, :]
                    tl.atomic_add(weight_sums_ptrs, contribution, mask=valid_in_row, sem="relaxed")
                if scratch_ptr is not None:
                    slot = tl.load(slots_ptr + pair, mask=exists, other=0).to(tl.uint32, bitcast=True)
                    slot_row = tl.multiple_of(slot.to(tl.int64) * scratch_stride, ALIGN)
                    tl.store(
                        scratch_ptr + slot_row[:, None] + scratch_cols[None, :],
                        suffixes * per_unit,
                        mask=exists[:, None],
                        eviction_policy="evict_first",  # the L2 cache is for weight
                    )
                if vals_sums_ptr is not None:
                    dot = scale * tl.sum(weight * suffixes, axis=1)
                    if ATOMIC:
                        tl.atomic_add(vals_sums_ptr + pair, dot, mask=exists, sem="relaxed")
                    else:
                        share_ptr = vals_sums_ptr + tile.to(tl.int64) * B * K + pair
                        if first_tile > 0:
                            dot += tl.load(share_ptr, mask=exists, other=0.0)
                        tl.store(share_ptr, dot, mask=exists)

                steps += BLOCK_K
                feature, val, valid = next_feature, next_val, next_valid


def _hierarchical_forward(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    needs_suffix: bool,
    needs_plan: bool,
    needs_pairs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The loss, and what is needed of S_0 [B, D], the units of scratch [B], the plan of copies (else empty tensors) and
    the OrderedPairs (else none)."""
    (B, K), (F, D) = indices.shape, weight.shape
    dtype = compute_dtype(weight, vals, bias, target)
    weight, target = unit_stride_rows(weight), unit_stride_rows(target)
    indices, vals = indices.contiguous(), vals.contiguous()
    block_k, block_d = min(_FORWARD_BLOCK_K, next_power_of_2(K)), tile_columns(weight, dtype)
    tiles = cdiv(D, block_d)
    shares = torch.empty((tiles, B), dtype=dtype, device=weight.device)
    suffix = new_empty(weight, *((B, D) if needs_suffix else (0,)), dtype=dtype)
    plan = new_plan(indices, F) if needs_plan else indices.new_empty(0)
    pairs = new_pairs(indices, F, dtype) if needs_pairs else ()
    with device_of(weight):
        before = mark(B * K * D, weight) if needs_pairs else None
        _hierarchical_forward_kernel[(B, tiles)](
            shares,
            suffix,
            plan if needs_plan else None,
            indices,
            weight,
            vals,
            bias.contiguous(),
            target,
            weight.stride(0),
            target.stride(0),
            B,
            K,
            F,
            D,
            int(needs_copies(B, K)),
            NEEDS_SUFFIX=needs_suffix,
            EVEN_K=K % block_k == 0,
            EVEN_D=D % block_d == 0,
            ALIGN=lane_columns(weight, block_d),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
        narrow = _narrow_scratch(weight, dtype)
        losses = shares.sum(0) if narrow else shares
        units = _units(losses, tiles, K, D) if narrow and needs_suffix else shares.new_empty(0)
        if needs_plan:
            plan_copies(plan, B, K)
        if needs_pairs:
            with beside(before):
                sort_pairs(pairs, indices)
            gather_pairs(pairs, indices, vals, units, want_slots=True)
    return losses.sum(), suffix, units, plan, list(pairs)


def _is_ordered(weight, dtype, needs_weight):
    """Whether the backward pass sums in order. Atomic additions to a gradient that is narrower than they are would
    round it again and again."""
    return torch.are_deterministic_algorithms_enabled() or (needs_weight and weight.dtype != dtype)


def _narrow_scratch(weight, dtype):
    """Whether scratch is float16: a gradient that keeps 8 bits, bfloat16, needs no more than 11 bits of S_i."""
    return weight.dtype == torch.bfloat16 and dtype == torch.float32


def _hierarchical_backward(
    grad_out: torch.Tensor,  # 0-dim
    suffix: torch.Tensor,  # [B, D], S_0
    units: torch.Tensor,  # [B], or empty
    plan: torch.Tensor,  # of copies, or empty
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    pairs: list[torch.Tensor],
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight [F, D], vals [B, K] and bias [D], an empty tensor for one that is not needed."""
    (B, K), (F, D) = indices.shape, weight.shape
    ordered = len(pairs) > 0 or _is_ordered(weight, suffix.dtype, needs_weight)

    def launcher(
        *,
        columns,
        block_k,
        block_d,
        align,
        vals_sums,
        weight_sums=None,
        copies_plan=None,
        scratch=None,
        scratch_slots=None,
        scratch_units=None,
    ):
        """A function that launches the kernel for ``columns`` of weight, those from a first one on."""
        block_k = min(block_k, next_power_of_2(K))
        args = (
            weight_sums,
            copies_plan,
            scratch,
            scratch_slots,
            scratch_units,
            vals_sums,
            suffix,
            scale,
            indices,
            weight,
            vals,
            bias,
            target,
            weight.stride(0),
            target.stride(0),
            columns,
            B,
            K,
            F,
            D,
        )
        constants = {
            "ATOMIC": not ordered,
            "EVEN_K": K % block_k == 0,
            "EVEN_D": D % block_d == 0,
            "ALIGN": align,
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
        }

        def launch(first_column):
            grid = (B, cdiv(min(columns, D - first_column), block_d))
            _hierarchical_backward_kernel[grid](*args, first_column // block_d, **constants, num_warps=1)

        return launch

    weight_grad = vals_grad = None
    with device_of(weight):
        # First, while S_0 is in the L2 cache, and also where bias needs no gradient: c comes with it. A launch for c
        # alone is up to a tenth of a small step.
        bias_sums, scale = sum_columns(suffix, grad_out, K)
        if needs_weight or needs_vals:
            weight, target = unit_stride_rows(weight), unit_stride_rows(target)
            indices, vals, bias = indices.contiguous(), vals.contiguous(), bias.contiguous()
            if not ordered:
                weight_grad, vals_grad = _atomic_gradients(
                    launcher, suffix, plan, weight, vals, needs_weight, needs_vals
                )
            else:
                if needs_weight and not pairs:  # Deterministic mode has been switched on since the forward pass.
                    pairs = new_pairs(indices, F, suffix.dtype)
                    sort_pairs(pairs, indices)
                    gather_pairs(pairs, indices, vals, units, want_slots=True)
                weight_grad, vals_grad = _ordered_gradients(
                    launcher, scale, suffix, units, weight, vals, pairs, needs_weight, needs_vals
                )
    return (
        weight_grad if needs_weight else weight.new_empty(0),
        vals_grad if needs_vals else vals.new_empty(0),
        bias_sums.to(bias.dtype) if needs_bias else bias.new_empty(0),
    )


def _atomic_gradients(launcher, suffix, plan, weight, vals, needs_weight, needs_vals):
    """The gradients of weight and vals, None for one that is not needed."""
    (B, K), (F, D) = vals.shape, weight.shape
    weight_sums = new_rows(weight, B, K) if needs_weight else None
    vals_sums = suffix.new_zeros(B, K) if needs_vals else None
    launch = launcher(
        columns=D,
        block_k=_ATOMIC_BLOCK_K,
        block_d=min(_atomic_columns(B, K, F, weight.element_size()), next_power_of_2(D)),
        # Twice as many a lane: then 16 lanes cover 64 columns, and two rows share the shuffles of the dot products.
        align=lane_columns(weight, 2 * _ATOMIC_BLOCK_D),
        vals_sums=vals_sums,
        weight_sums=weight_sums,
        copies_plan=plan if needs_weight else None,
    )
    launch(0)
    weight_grad = sum_copies(weight_sums, plan) if needs_weight else None
    return weight_grad, vals_sums.to(vals.dtype) if needs_vals else None


def _atomic_columns(B, K, F, itemsize):
    """Columns of a tile that adds to d weight atomically, but for a smaller D."""
    leaves_cache = 2 * F * _ATOMIC_BLOCK_D * itemsize > _L2_BYTES
    return _ATOMIC_BLOCK_D // 2 if leaves_cache and B * K >= 2 * F else _ATOMIC_BLOCK_D


def _ordered_gradients(launcher, scale, suffix, units, weight, vals, pairs, needs_weight, needs_vals):
    """The gradients of weight and vals, None for one that is not needed."""
    (B, K), D = vals.shape, weight.shape[1]
    scratch_dtype = torch.float16 if _narrow_scratch(weight, suffix.dtype) else suffix.dtype
    block_d = min(_SCRATCH_ROW_BYTES // scratch_dtype.itemsize, next_power_of_2(D))
    # The widest power of two that fits.
    columns = max(block_d, _SCRATCH_BYTES // (K * scratch_dtype.itemsize))
    columns = min(1 << (columns.bit_length() - 1), next_power_of_2(D))
    vals_sums = new_empty(suffix, cdiv(min(columns, D), block_d), B, K) if needs_vals else None
    weight_grad = scratch = slots = None
    if needs_weight:
        pairs = OrderedPairs(*pairs)
        weight_grad, slots, pieces = new_sums(pairs, weight), pairs.link, new_pieces(pairs, D)
        scratch = new_empty(suffix, B * K, columns, dtype=scratch_dtype)
        sum_scratch = pairs_summer(pairs, scratch, None, weight, scale, weight_grad, pieces)
    launch = launcher(
        columns=columns,
        block_k=_SCRATCH_BLOCK_K if block_d <= 64 else _WIDE_SCRATCH_BLOCK_K,
        block_d=block_d,
        align=lane_columns(weight, block_d),
        vals_sums=vals_sums,
        scratch=scratch,
        scratch_slots=slots,
        scratch_units=units if units.numel() else None,
    )
    for first_column in range(0, D, columns):
        launch(first_column)
        if needs_weight:
            sum_scratch(first_column)
    if needs_weight:
        finish(pairs, scale, weight_grad, pieces)
    return weight_grad, vals_sums.sum(0).to(vals.dtype) if needs_vals else None


def _units(losses, tiles, K, D):
    """For each sample a unit in which its S_i fit float16: unless its loss overflows or vanishes they are at most 2**15
    units, as by Cauchy-Schwarz |S_i| <= sum_j |r_j| <= sqrt(K sum_j |r_j|^2), and far from the smallest float16."""
    # What a tile's share lost to underflow is less than the smallest normal number. One that overflowed is infinite.
    limits = torch.finfo(losses.dtype)
    losses = losses.clamp(tiles * limits.tiny, limits.max)
    return losses.sqrt() * (math.sqrt(losses.numel() * K * D * K) / 2**15)


torch.library.define(
    add_op_namespace_prefix("hierarchical_forward"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor bias, Tensor target, bool needs_suffix, bool needs_plan,"
    " bool needs_pairs) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
torch.library.impl(add_op_namespace_prefix("hierarchical_forward"), "default", _hierarchical_forward)

torch.library.define(
    add_op_namespace_prefix("hierarchical_backward"),
    "(Tensor grad_out, Tensor suffix, Tensor units, Tensor plan, Tensor indices, Tensor weight, Tensor vals,"
    " Tensor bias, Tensor target, Tensor[] pairs, bool needs_weight, bool needs_vals, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("hierarchical_backward"), "default", _hierarchical_backward)


@torch.library.register_fake(add_op_namespace_prefix("hierarchical_forward"))
def _hierarchical_forward_fake(indices, weight, vals, bias, target, needs_suffix, needs_plan, needs_pairs):
    dtype = compute_dtype(weight, vals, bias, target)
    suffix = weight.new_empty(target.shape if needs_suffix else (0,), dtype=dtype)
    units = suffix.new_empty(target.shape[0] if needs_suffix and _narrow_scratch(weight, dtype) else 0)
    plan = new_plan(indices, weight.shape[0]) if needs_plan else indices.new_empty(0)
    pairs = list(new_pairs(indices, weight.shape[0], dtype, empty=torch.Tensor.new_empty)) if needs_pairs else []
    return suffix.new_empty(()), suffix, units, plan, pairs


@torch.library.register_fake(add_op_namespace_prefix("hierarchical_backward"))
def _hierarchical_backward_fake(grad_out, suffix, units, plan, indices, weight, vals, bias, target, pairs, *needs):
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip((weight, vals, bias), needs))


class HierarchicalSAELoss(torch.autograd.Function):
    """The two ops above as one differentiable function, see `triton_hierarchical_sae_loss`."""

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, target, needs_grad):
        dtype = compute_dtype(weight, vals, bias, target)
        needs_weight = needs_grad and ctx.needs_input_grad[1]
        ordered = _is_ordered(weight, dtype, needs_weight)
        loss, suffix, units, plan, pairs = ops.hierarchical_forward(
            indices, weight, vals, bias, target, needs_grad, needs_weight and not ordered, needs_weight and ordered
        )
        ctx.save_for_backward(suffix, units, plan, *savable(indices, weight, vals, bias, target), *pairs)
        return loss

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivative("triton_hierarchical_sae_loss")
        suffix, units, plan, indices, weight, vals, bias, target, *pairs = ctx.saved_tensors
        _, *needs, needs_target, _ = ctx.needs_input_grad
        grads = (None,) * 3
        if any(needs):
            grads = ops.hierarchical_backward(
                grad_out, suffix, units, plan, indices, weight, vals, bias, target, pairs, *needs
            )
            grads = (grad if needed else None for grad, needed in zip(grads, needs))
        target_grad = None
        if needs_target:
            target_grad = (suffix * (grad_out * (-2.0 / (indices.shape[1] * suffix.numel())))).to(target.dtype)
        return None, *grads, target_grad, None


def triton_hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the reconstructions from the first 1, 2, .., K features of each sample, fused.

    ``loss = mean over b, j, d of (bias + sum_{i <= j} vals[b, i] * weight[indices[b, i]] - target[b])[d] ** 2``, the
    HierarchicalTopK objective of arXiv 2505.24473, section 3, over all budgets 1..K. The order of the columns matters:
    column 0 is the most important feature. Pass ``torch.topk(..., sorted=True)`` output.

    Args:
        indices: ``[B, K]`` int32 or int64, the active features of each sample, most important first, in ``[0, F)``.
            One out of range is not followed and makes the loss and every gradient that its sample has a part in NaN (it
            may count as any other); ``FLEX_SAE_CHECK_INDICES=1`` in the environment raises IndexError instead, at the
            cost of a device synchronisation.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: ``[B, K]``, the activations.
        bias: ``[D]``.
        target: ``[B, D]``, what to reconstruct.

    weight, vals, bias and target are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64
    if any of the four is, and are rounded once, where they are stored. Where weight is bfloat16 and sums are float32,
    the S_i in its gradient are rounded to 11 bits before, three more than the gradient keeps (to fewer below 2e-9 of
    the largest that the sample can have). Where residuals are so large or small that their squares leave the range of
    float32, those S_i may overflow or be lost, and a NaN in some columns of a sample takes all of them. There and in
    deterministic mode a sum of vals times S_i is multiplied by 2 / (B * K * D) last, and must not overflow before.

    In float32 the S_i of the last steps are what is left of S_0 once all other residuals are taken away. Where K is in
    the hundreds, or residuals shrink by orders of magnitude along it, their gradients have fewer right digits than
    those of the first steps.

    Returns:
        0-dim float32 (float64 if any input is) tensor, differentiable once in weight, vals, bias and target. Loss and
        gradients of bias and target are the same bits every run; so are those of weight and vals under
        ``torch.use_deterministic_algorithms(True)``, which takes up to twice the time. That way, and wherever weight is
        narrower than sums, at most ``B * max(32768, 256 * K)`` bytes of scratch are taken. Tensors on a CPU go to
        `hierarchical_sae_loss`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, or B >= 2**31, K or F > 2**31 - 2**16, D > 2**20,
            B * (K + 1) > 2**32 - 2**22, B * (D + 31) >= 2**36 or (F + 2**16) * (D + 255) > 2**39.
    """
    check_inputs(indices, weight, vals, bias, target)
    if not runs_triton(indices):
        return hierarchical_sae_loss(indices, weight, vals, bias, target)
    with no_grad_in_inference_mode():
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, vals, bias, target))
        return HierarchicalSAELoss.apply(indices, weight, vals, bias, target, needs_grad)


def hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """`triton_hierarchical_sae_loss` in plain torch, on any device: the same arguments, semantics and errors.

    It holds ``[B, K, D]`` numbers several times over and leaves the gradients to autograd.
    """
    check_inputs(indices, weight, vals, bias, target)
    dtype = compute_dtype(weight, vals, bias, target)
    rows, vals = select(indices, weight, vals, dtype)
    recons = bias.to(dtype) + (vals.unsqueeze(-1) * rows).cumsum(1)
    return (recons - target.to(dtype).unsqueeze(1)).square().mean()

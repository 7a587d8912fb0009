"""The (sample, step) pairs of a batch: reading a sample's pairs, ordering all of them by feature, summing by feature.

The gradient of a feature is a sum over the pairs that chose it,

    out[f] = scale * sum over pairs p with feature f of coefs[p] * rows[p].

With the pairs ordered by feature, each row of ``out`` is one segment of the order: it is summed in registers in a fixed
order and written once. No float atomics, no zero fill, the same bits every run.

Dictionaries are skewed: one feature may hold a large part of all pairs. A feature of more than ``window`` pairs is
therefore cut at every multiple of ``window`` in the order. Each piece has a program of its own, and a second kernel
adds the pieces of a feature in order.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix
from .checks import cdiv, device_of, new_empty, next_power_of_2

# Columns of a program of the feature sum, one warp. Swept over 256, 512 and 1024 on an H200 (B=4096, F=65536, D=2304):
# 0.40, 0.37, 0.43 ms at K=32 and 0.73, 0.66, 0.72 ms at K=128.
SUM_BLOCK_D = 512
# The longest program adds this many pairs. Flat from 128 to 512 on an H200, for uniform and Zipf(1) indices.
_MIN_WINDOW = 256
# Windows at most, so that the pieces take at most [2 * _MAX_WINDOWS, D] whatever B and K are.
_MAX_WINDOWS = 2048
# Pairs of a program, four warps, of the kernels that only move pairs: 2% of a step together.
_FLAT_BLOCK = 1024
# Positions in the order are int32 below this many pairs: then those a window past the last pair still fit.
_MAX_INT32_PAIRS = 2**30
# torch.sort takes at most this many elements along a dimension.
_MAX_SORT = 2**31 - 1


@triton.jit
def load_pairs(
    indices_ptr,  # [B, K]
    vals_ptr,  # [B, K]
    b,
    steps,
    K,
    F,
    dtype: tl.constexpr,
):
    """Features, vals and load mask of some steps of sample b. A feature out of range is never loaded from: its val
    becomes NaN, and with it the sample's residual and the loss."""
    exists = steps < K
    feature = tl.load(indices_ptr + b * K + steps, mask=exists, other=0).to(tl.int64)
    val = tl.load(vals_ptr + b * K + steps, mask=exists, other=0.0).to(dtype)
    valid = (feature >= 0) & (feature < F)
    return feature, tl.where(valid, val, float("nan")), valid & exists


@triton.jit(do_not_specialize=["P", "F"])
def _gather_pairs_kernel(
    features_ptr,  # [P]
    coefs_ptr,  # [P]
    samples_ptr,  # [P] or None
    slots_ptr,  # [B * K] or None
    order_ptr,  # [P]
    indices_ptr,  # [B * K]
    vals_ptr,  # [B * K]
    units_ptr,  # [B] or None
    P,
    K,
    F,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = p < P
    pair = tl.load(order_ptr + p, mask=exists, other=0)
    feature = tl.load(indices_ptr + pair, mask=exists, other=0)
    tl.store(features_ptr + p, tl.minimum(tl.maximum(feature, 0), F - 1), mask=exists)
    coef = tl.load(vals_ptr + pair, mask=exists, other=0.0).to(coefs_ptr.dtype.element_ty)
    if units_ptr is not None:
        coef *= tl.load(units_ptr + pair // K, mask=exists, other=0.0)
    tl.store(coefs_ptr + p, coef, mask=exists)
    if samples_ptr is not None:
        tl.store(samples_ptr + p, pair // K, mask=exists)
    if slots_ptr is not None:
        tl.store(slots_ptr + pair, p, mask=exists)


@triton.jit(do_not_specialize=["offset", "P", "F"], do_not_specialize_on_alignment=["shifts_ptr"])
def _merge_order_kernel(
    merged_ptr,  # [B * K]
    order_ptr,  # [P], of a part of the pairs
    indices_ptr,  # [B * K]
    shifts_ptr,  # [F], how far the pairs of a feature move
    offset,  # the pairs before the part
    P,
    F,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = p < P
    pair = offset + tl.load(order_ptr + p, mask=exists, other=0)
    feature = tl.load(indices_ptr + pair, mask=exists, other=0)
    shift = tl.load(shifts_ptr + tl.minimum(tl.maximum(feature, 0), F - 1), mask=exists, other=0)
    tl.store(merged_ptr + p + shift, pair, mask=exists)


@triton.jit
def _segment(ends_ptr, feature):
    """Where the segment of a feature starts and ends in the order."""
    return tl.load(ends_ptr + feature - 1, mask=feature > 0, other=0), tl.load(ends_ptr + feature)


@triton.jit
def _load_row_ids(samples_ptr, p, end):
    """The rows of pairs p: those of their samples, or without samples the pairs' own."""
    if samples_ptr is None:
        return p.to(tl.int64)
    else:
        return tl.load(samples_ptr + p, mask=p < end, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["P", "window", "windows", "first_tile"])
def _sum_pairs_kernel(
    out_ptr,  # [F, D]
    pieces_ptr,  # [2 * windows, D]
    dots_ptr,  # [cdiv(D, BLOCK_D), P], a tile's share of <weight[features[p]], rows[p]>
    rows_ptr,  # [B, D], the row of pair p at samples[p]; without samples [P, COLS], at p
    samples_ptr,  # [P] or None
    coefs_ptr,  # [P]
    features_ptr,  # [P], ascending
    ends_ptr,  # [F]
    weight_ptr,  # [F, D]
    scale_ptr,  # 0-dim
    rows_stride,
    weight_stride,
    D,
    P,
    window,
    windows,
    first_tile,  # the tile of out at which rows start
    SUMS: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS_POLICY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Feature fastest: all features walk the same columns of rows while they sit in the L2 cache. The pieces of heavy
    # features, which take longest, go first.
    pid = tl.program_id(0)
    is_piece = pid < 2 * windows
    if is_piece:
        # A window meets at most two heavy features: one that reaches its start, one that reaches its end.
        first = (pid // 2).to(ends_ptr.dtype.element_ty) * window
        stop = tl.minimum(first + window, P)
        feature = tl.load(features_ptr + tl.where(pid % 2 == 0, first, stop - 1))
        start, end = _segment(ends_ptr, feature)
        active = (end - start > window) & ((pid % 2 == 0) | (start > first))
        start = tl.maximum(start, first)
        end = tl.minimum(end, stop)
    else:
        feature = pid - 2 * windows
        start, end = _segment(ends_ptr, feature)
        active = end - start <= window
    if active:
        dtype: tl.constexpr = scale_ptr.dtype.element_ty
        tile = tl.program_id(1).to(tl.int64)
        cols = (first_tile + tile) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = cols < D
        out_row = feature.to(tl.int64)
        # weight and out are touched once: they leave the L2 cache to the rows.
        if DOTS:
            weight = tl.load(
                weight_ptr + out_row * weight_stride + cols, mask=in_row, other=0.0, eviction_policy="evict_first"
            ).to(dtype)
        total = tl.zeros([BLOCK_D], dtype)
        p = start + tl.arange(0, BLOCK_P)
        row = _load_row_ids(samples_ptr, p, end)
        coef = tl.load(coefs_ptr + p, mask=p < end, other=0.0)
        for _ in range(start, end, BLOCK_P):
            mask = (p < end)[:, None] & in_row[None, :]
            row_start = row * rows_stride - first_tile * BLOCK_D
            x = tl.load(
                rows_ptr + row_start[:, None] + cols[None, :], mask=mask, other=0.0, eviction_policy=ROWS_POLICY
            ).to(dtype)
            if SUMS:
                total += tl.sum(coef[:, None] * x, axis=0)
            if DOTS:
                tl.store(dots_ptr + tile * P + p, tl.sum(weight[None, :] * x, axis=1), mask=p < end)
            # The next pairs are on their way before these rows are summed.
            p += BLOCK_P
            row = _load_row_ids(samples_ptr, p, end)
            coef = tl.load(coefs_ptr + p, mask=p < end, other=0.0)
        if SUMS:
            if is_piece:
                tl.store(pieces_ptr + pid.to(tl.int64) * D + cols, total, mask=in_row)
            else:
                total *= tl.load(scale_ptr)
                tl.store(out_ptr + out_row * D + cols, total, mask=in_row, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["P", "window"])
def _sum_pieces_kernel(
    out_ptr,  # [F, D]
    pieces_ptr,  # [2 * windows, D]
    features_ptr,  # [P], ascending
    ends_ptr,  # [F]
    scale_ptr,  # 0-dim
    D,
    P,
    window,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The window in which a heavy feature starts adds up its pieces. The feature is the last one of that window.
    w = tl.program_id(0)
    first = w.to(ends_ptr.dtype.element_ty) * window
    feature = tl.load(features_ptr + tl.minimum(first + window, P) - 1)
    start, end = _segment(ends_ptr, feature)
    if (end - start > window) & (start >= first):
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = cols < D
        total = tl.zeros([BLOCK_D], scale_ptr.dtype.element_ty)
        last = (end - 1) // window
        for w0 in range(w, last + 1, BLOCK_W):
            ws = w0 + tl.arange(0, BLOCK_W)
            piece = 2 * ws.to(tl.int64) + tl.where((ws == w) & (start > first), 1, 0)
            mask = (ws <= last)[:, None] & in_row[None, :]
            total += tl.sum(tl.load(pieces_ptr + (piece * D)[:, None] + cols[None, :], mask=mask, other=0.0), axis=0)
        tl.store(out_ptr + feature.to(tl.int64) * D + cols, total * tl.load(scale_ptr), mask=in_row)


@triton.jit(do_not_specialize=["P"])
def _scatter_dots_kernel(
    vals_grad_ptr,  # [B * K]
    dots_ptr,  # [tiles, P]
    order_ptr,  # [P]
    scale_ptr,  # 0-dim
    P,
    tiles,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = p < P
    total = tl.zeros([BLOCK], scale_ptr.dtype.element_ty)
    for _ in range(tiles):
        total += tl.load(dots_ptr + p, mask=exists, other=0.0)
        dots_ptr += P
    pair = tl.load(order_ptr + p, mask=exists, other=0)
    tl.store(vals_grad_ptr + pair, total * tl.load(scale_ptr), mask=exists)


class OrderedPairs(NamedTuple):
    """The P = B * K pairs ordered by feature, those of one feature by their place in ``indices.flatten()``."""

    order: torch.Tensor  # [P] int64, places in indices.flatten()
    features: torch.Tensor  # [P] int32, ascending
    ends: torch.Tensor  # [F], where the segment of each feature ends
    coefs: torch.Tensor  # [P], vals in this order, times the unit of their sample
    samples: torch.Tensor  # [P], order // K, or empty
    slots: torch.Tensor  # [B * K], the inverse of order, or empty


def _order_pairs(
    indices: torch.Tensor,  # [B, K]
    vals: torch.Tensor,  # [B, K]
    units: Optional[torch.Tensor],  # [B]
    F: int,
    dtype: torch.dtype,
    want_slots: bool,
) -> OrderedPairs:
    """Order the pairs by feature, with ``slots`` for rows that are yet to be written in this order, else with
    ``samples`` for rows that lie by sample. A feature out of range counts as the nearest one in range, whose gradient
    becomes NaN with that of the sample."""
    indices, vals = indices.contiguous(), vals.contiguous()
    K, P = indices.shape[1], indices.numel()
    with device_of(indices):
        order, ends = _sort_by_feature(indices.flatten(), F)
        features = indices.new_empty(P, dtype=torch.int32)
        coefs = vals.new_empty(P, dtype=dtype)
        samples = indices.new_empty(0 if want_slots else P, dtype=torch.int32)
        slots = indices.new_empty(P if want_slots else 0, dtype=_place_dtype(P))
        _gather_pairs_kernel[(cdiv(P, _FLAT_BLOCK),)](
            features,
            coefs,
            None if want_slots else samples,
            slots if want_slots else None,
            order,
            indices,
            vals,
            units,
            P,
            K,
            F,
            BLOCK=_FLAT_BLOCK,
        )
    return OrderedPairs(order, features, ends, coefs, samples, slots)


torch.library.define(
    add_op_namespace_prefix("order_pairs"),
    "(Tensor indices, Tensor vals, Tensor? units, int F, ScalarType dtype, bool want_slots)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("order_pairs"), "default", _order_pairs)


@torch.library.register_fake(add_op_namespace_prefix("order_pairs"))
def _order_pairs_fake(indices, vals, units, F, dtype, want_slots):
    P = indices.numel()
    return (
        indices.new_empty(P, dtype=torch.int64),
        indices.new_empty(P, dtype=torch.int32),
        indices.new_empty(F, dtype=_place_dtype(P)),
        indices.new_empty(P, dtype=dtype),
        indices.new_empty(0 if want_slots else P, dtype=torch.int32),
        indices.new_empty(P if want_slots else 0, dtype=_place_dtype(P)),
    )


def _place_dtype(P):
    return torch.int32 if P < _MAX_INT32_PAIRS else torch.int64


def _sort_by_feature(indices, F):
    """The stable order of flat indices by feature, and where each feature ends in it."""
    # torch.sort is a radix sort: half the passes where a feature fits 16 bits.
    dtype, lowest = (torch.int16, -(2**15)) if F <= 2**16 else (torch.int32, 0)
    features = torch.arange(lowest, lowest + F, device=indices.device, dtype=dtype)
    orders, ends = [], []
    for part in indices.split(_MAX_SORT):
        keys, order = torch.sort((part.clamp(0, F - 1) + lowest).to(dtype), stable=True)
        orders.append(order)
        out_int32 = _place_dtype(indices.numel()) == torch.int32
        ends.append(torch.searchsorted(keys, features, right=True, out_int32=out_int32))
    return (orders[0], ends[0]) if len(orders) == 1 else _merge(orders, ends, indices)


def _merge(orders, ends, indices):
    """One order and its ends from those of consecutive parts."""
    counts = torch.stack(ends).diff(dim=1, prepend=ends[0].new_zeros(len(ends), 1))  # [parts, F]
    merged_ends = counts.sum(0).cumsum(0).to(ends[0].dtype)
    # A feature's pairs lie part after part: by how far each segment of each part moves.
    shifts = merged_ends - counts.sum(0) + counts.cumsum(0) - torch.stack(ends)
    merged, offset = orders[0].new_empty(indices.numel()), 0
    for order, shift in zip(orders, shifts):
        P = order.numel()
        _merge_order_kernel[(cdiv(P, _FLAT_BLOCK),)](
            merged, order, indices, shift, offset, P, len(shift), BLOCK=_FLAT_BLOCK
        )
        offset += P
    return merged, merged_ends


def new_pieces(pairs: OrderedPairs, D: int) -> torch.Tensor:
    """Memory for the pieces of heavy features [2 * windows, D]."""
    _, windows = _windows(pairs)
    return new_empty(pairs.coefs, 2 * windows, D)


def _windows(pairs):
    P = pairs.order.numel()
    window = max(_MIN_WINDOW, cdiv(P, _MAX_WINDOWS))
    return window, cdiv(P, window)


def sum_pairs(
    pairs: OrderedPairs,
    rows: torch.Tensor,  # [B, D], or with slots [P, columns]
    weight: torch.Tensor,  # [F, D]
    scale: torch.Tensor,  # 0-dim
    out: Optional[torch.Tensor],  # [F, D]
    pieces: Optional[torch.Tensor],  # [2 * windows, D]
    dots: Optional[torch.Tensor] = None,  # [tiles, P]
    first_column: int = 0,
) -> None:
    """Write ``out[f] = scale * sum of coefs[p] * rows[p]`` over the pairs of each feature f, but for heavy features,
    whose pieces `sum_pieces` adds, and ``dots[tile, p]``, a tile's share of ``<weight[f], rows[p]>``. What is None is
    left out. ``rows`` may hold some columns of the whole, from ``first_column`` on."""
    (F, D), columns = weight.shape, rows.shape[1]
    window, windows = _windows(pairs)
    block_d = min(SUM_BLOCK_D, next_power_of_2(columns))
    by_sample = pairs.samples.numel() > 0
    _sum_pairs_kernel[(2 * windows + F, cdiv(min(columns, D - first_column), block_d))](
        out,
        pieces,
        dots,
        rows,
        pairs.samples if by_sample else None,
        pairs.coefs,
        pairs.features,
        pairs.ends,
        weight,
        scale,
        rows.stride(0),
        weight.stride(0),
        D,
        pairs.order.numel(),
        window,
        windows,
        first_column // block_d,
        SUMS=out is not None,
        DOTS=dots is not None,
        # A sample's row is read by many features, a row in the order by one.
        ROWS_POLICY="" if by_sample else "evict_first",
        # Enough pairs at a time to keep a warp's loads busy. Swept over 1 to 16 on an H200: flat to within 5%.
        BLOCK_P=min(8, (SUM_BLOCK_D if by_sample else 2 * SUM_BLOCK_D) // block_d),
        BLOCK_D=block_d,
        num_warps=1,
    )


def sum_pieces(pairs: OrderedPairs, pieces: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write the rows of ``out [F, D]`` of heavy features from the ``pieces`` that `sum_pairs` left."""
    D = out.shape[1]
    window, windows = _windows(pairs)
    block_d = min(SUM_BLOCK_D, next_power_of_2(D))
    _sum_pieces_kernel[(windows, cdiv(D, block_d))](
        out,
        pieces,
        pairs.features,
        pairs.ends,
        scale,
        D,
        pairs.order.numel(),
        window,
        BLOCK_W=4,
        BLOCK_D=block_d,
        num_warps=1,
    )


def scatter_dots(pairs: OrderedPairs, dots: torch.Tensor, scale: torch.Tensor, vals_grad: torch.Tensor) -> None:
    """Write ``vals_grad[order[p]] = scale * dots[:, p].sum()``; ``vals_grad [B, K]`` is contiguous."""
    P = pairs.order.numel()
    _scatter_dots_kernel[(cdiv(P, _FLAT_BLOCK),)](
        vals_grad, dots, pairs.order, scale, P, dots.shape[0], BLOCK=_FLAT_BLOCK
    )

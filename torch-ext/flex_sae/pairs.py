"""The (sample, step) pairs of a batch: reading a sample's pairs, ordering all of them by feature, summing by feature.

The gradient of a feature is a sum over the pairs that chose it,

    out[f] = scale * sum over pairs p with feature f of coefs[p] * rows[p].

With the pairs ordered by feature (torch sorts them, or a few are counted), each row of ``out`` is one segment of the
order: it is summed in registers in a fixed order and written once. No float atomics, the same bits every run; zeros are
written first only where most features have no pair. The same pass can take the dot products <weight[f], rows[p]> of the
gradient of vals.

Dictionaries are skewed: one feature may hold a large part of all pairs. A feature of more than ``window`` pairs is
therefore cut at every multiple of ``window`` in the order. Each piece has a program of its own, and a second kernel
adds the pieces of a feature in order.

A bias is one more feature, which every sample has with a val of 1. Its pairs, if they are wanted, follow all others in
the order, and it is always summed in pieces.
"""

import math
from typing import Callable, NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .checks import cdiv, new_empty, next_power_of_2
from .launch import quick_launch, wait_for_memory

# Columns of a program of the feature sum, one warp. On an H200 (B=4096, F=65536, D=2304) a TopK step takes 0.61, 0.57,
# 0.67 ms at K=32 and 1.29, 1.23, 1.35 at K=128 with 256, 512, 1024.
SUM_BLOCK_D = 512
# A program adds at most this many pairs of a feature, more where the windows would be too many. On an H200 (B=4096,
# F=65536, D=2304, K=32) a TopK step takes 0.50, 0.55, 0.65 ms with 128, 256, 512 for Zipf(1) indices; 0.575, 0.573,
# 0.572 for uniform ones.
_MIN_WINDOW = 128
# Windows at most, so that pieces of features take at most [2 * _MAX_WINDOWS, D] whatever B and K are. At K=128 it takes
# 1.34, 1.19, 1.14 ms with 512, 1024, 2048 for Zipf(1) indices; 1.23 for uniform ones.
_MAX_WINDOWS = 2048
# Pairs of a program, four warps, of the kernels that only move pairs. On an H200 (B=4096, K=128) 256 take 7 us, 1024
# take 10.
_FLAT_BLOCK = 256
# Pairs, and pieces and columns, of a program that finishes, one warp: most find no heavy feature, so small ones are the
# fastest. On an H200 (B=4096, K=128, D=2304) they take 14 us; with 64, 128, 256 pairs 17, 20, 20 us, at B=8192 21, 26,
# 31 instead of 24. Other numbers of pieces and columns gain there what they lose on Zipf(1) indices.
_FINISH_BLOCK_P, _FINISH_BLOCK_W, _FINISH_BLOCK_D = 32, 4, 256
# Pieces of bias and columns of such a program. Others (8, 32, 64 pieces, 32, 128 columns) are no faster.
_BIAS_BLOCK_W, _BIAS_BLOCK_D = 16, 64
# From this many features a pair on, most of them have none. On an H200 (B=4096, D=2304, F=262144) a TopK step with
# K=8, 16, 32, 64 takes 0.88, 1.03, 1.40, 2.03 ms with a program for each pair, 1.00, 1.06, 1.27, 1.65 for each feature.
_SPARSE = 4
# Up to this many features keys are 16 bits wide: half the passes of torch.sort, a radix sort.
_MAX_NARROW_F = tl.constexpr(2**16)
# torch.sort takes at most this many elements along a dimension.
_MAX_SORT = 2**31 - 1
# Up to so many pairs each finds its place by counting the pairs before it, in one launch instead of the many of a sort.
# On an H200 (F=16384, D=768) the forward pass of TopK then takes 16, 31, 75 us of the device's time and 120 to 130 of
# the host's for 2**11, 2**13, 2**14 pairs; with a sort 30, 44, 53 and 190.
_MAX_FEW = 2**13
# Pairs of such a program, four warps, and pairs that they are compared with at a time. Of 4 to 32 and 64 to 512 on an
# H200 the fastest for 2**14, within 1 us of it for 2**11 and 2**13.
_FEW_BLOCK, _FEW_BLOCK_OTHERS = 16, 128
# Arguments that must not compile a kernel again: those that another B or F changes, and first_tile.
_SIZES = ("P", "F", "window", "windows", "bias_pairs", "bias_window", "bias_windows", "by_pair", "few", "first_tile")
# Pairs of which a merge of several sorts computes the places at a time: a few hundred MB beside the tens of GB that so
# many pairs take.
_MERGE_BLOCK = 2**24


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
    """Features, vals and validity of some steps of sample b. A feature out of range becomes feature 0 with a val of
    NaN, and with it the sample's residual and the loss.

    Every feature can be loaded from, so that a kernel whose tiles end with step K and column D masks nothing: masks can
    be a third of the instructions of its loop."""
    exists = steps < K
    feature = tl.load(indices_ptr + b * K + steps, mask=exists, other=0).to(tl.int64)
    val = tl.load(vals_ptr + b * K + steps, mask=exists, other=0.0).to(dtype)
    valid = feature.to(tl.uint64, bitcast=True) < F.to(tl.uint64)  # a negative one is huge
    return tl.where(valid, feature, 0), tl.where(valid, val, float("nan")), valid & exists


@triton.jit
def _load_feature(keys_ptr, p, exists, F):
    """The feature of pair p in the order, from its key; one in range for one out of range."""
    if F <= _MAX_NARROW_F:
        feature = tl.load(keys_ptr + p, mask=exists, other=0).to(tl.int32) + 2**15
    else:
        feature = tl.load(keys_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + p, mask=exists, other=0)
    return tl.minimum(tl.maximum(feature, 0), F - 1)


@triton.jit
def _store_feature(keys_ptr, p, feature, exists, F):
    """The key of pair p in the order, for `_load_feature`."""
    if F <= _MAX_NARROW_F:
        tl.store(keys_ptr + p, (feature - 2**15).to(tl.int16), mask=exists)
    else:
        tl.store(keys_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + p, feature, mask=exists)


@triton.jit
def _load_index(indices_ptr, pair, end, F):
    """The features of pairs, one in range for one out of range; F from the end on."""
    exists = pair < end
    feature = tl.load(indices_ptr + pair, mask=exists, other=0)
    return tl.where(exists, tl.minimum(tl.maximum(feature, 0), F - 1), F).to(tl.int32)


@triton.jit
def _count(indices_ptr, start, end, feature, F, BLOCK: tl.constexpr):
    """For each feature how many of the pairs from start to end have a smaller one, and how many no larger one."""
    smaller = tl.zeros([feature.shape[0], BLOCK], tl.int32)
    not_larger = tl.zeros([feature.shape[0], BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        difference = _load_index(indices_ptr, first + tl.arange(0, BLOCK), end, F)[None, :] - feature[:, None]
        # Minus the sign bit takes fewer instructions than a comparison.
        smaller -= difference >> 31
        not_larger -= (difference - 1) >> 31
    return tl.sum(smaller, axis=1), tl.sum(not_larger, axis=1)


@triton.jit
def _find_places(
    segments_ptr,  # [F, 2]
    keys_ptr,  # [P]
    order_ptr,  # [P]
    indices_ptr,  # [P]
    P,
    F,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Write keys, order and segments for some pairs, and return the pairs and their places. What lies beyond P keeps
    its place."""
    first = tl.program_id(0) * BLOCK
    pair = first + tl.arange(0, BLOCK)
    exists = pair < P
    feature = _load_index(indices_ptr, pair, P, F)
    before = tl.where(first < P, first, 0)  # nobody asks for the places of pairs beyond P
    smaller_before, not_larger_before = _count(indices_ptr, 0, before, feature, F, BLOCK_OTHERS)
    smaller_after, not_larger_after = _count(indices_ptr, first, P, feature, F, BLOCK_OTHERS)
    earlier = (feature[None, :] == feature[:, None]) & (pair[None, :] < pair[:, None])
    p = not_larger_before + smaller_after + tl.sum(earlier.to(tl.int32), axis=1)
    _store_feature(keys_ptr, p, feature, exists, F)
    tl.store(order_ptr + p, pair, mask=exists)
    segment_ptr = segments_ptr + 2 * feature.to(tl.int64)
    tl.store(segment_ptr, smaller_before + smaller_after, mask=exists)
    tl.store(segment_ptr + 1, not_larger_before + not_larger_after, mask=exists)
    return pair, tl.where(exists, p, pair)


@triton.jit
def _gather(
    coefs_ptr,  # [P + bias_pairs]
    samples_ptr,  # [P + bias_pairs] or None
    slots_ptr,  # [P] or None
    vals_ptr,  # [P]
    units_ptr,  # [B], or None for units of 1
    pair,
    p,
    P,
    K,
    bias_pairs,
):
    """Write what is kept in the order for pairs and their places, those of bias, from P on, among them."""
    exists = p < P
    exists_with_bias = p < P + bias_pairs
    sample = tl.where(exists, pair // K, p - P)
    coef = tl.load(vals_ptr + pair, mask=exists, other=1.0).to(coefs_ptr.dtype.element_ty)
    if units_ptr is not None:
        coef *= tl.load(units_ptr + sample, mask=exists_with_bias, other=0.0)
    tl.store(coefs_ptr + p, coef, mask=exists_with_bias)
    if samples_ptr is not None:
        tl.store(samples_ptr + p, sample, mask=exists_with_bias)
    if slots_ptr is not None:
        tl.store(slots_ptr + pair, p, mask=exists)


@quick_launch
@triton.jit(do_not_specialize=_SIZES)
def _gather_pairs_kernel(
    segments_ptr,  # [F, 2], zeros
    coefs_ptr,  # [P + bias_pairs]
    samples_ptr,  # [P + bias_pairs] or None
    slots_ptr,  # [B * K] or None
    keys_ptr,  # [P], see `OrderedPairs`
    order_ptr,  # [P]
    indices_ptr,  # [B * K]
    vals_ptr,  # [B * K]
    units_ptr,  # [B], or None for units of 1
    P: tl.int64,
    K,
    F,
    bias_pairs,
    few,  # keys and order are yet to be written
    BLOCK: tl.constexpr,
    FEW_BLOCK: tl.constexpr,
    FEW_BLOCK_OTHERS: tl.constexpr,
):
    wait_for_memory()
    if few:
        pair, p = _find_places(
            segments_ptr, keys_ptr, order_ptr, indices_ptr, P.to(tl.int32), F, FEW_BLOCK, FEW_BLOCK_OTHERS
        )
        _gather(coefs_ptr, samples_ptr, slots_ptr, vals_ptr, units_ptr, pair, p, P, K, bias_pairs)
    else:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        exists = place < P
        pair_at = tl.load(order_ptr + place, mask=exists, other=0)
        _gather(coefs_ptr, samples_ptr, slots_ptr, vals_ptr, units_ptr, pair_at, place, P, K, bias_pairs)
        # Where one feature's pairs end and the next one's start.
        has_next = place + 1 < P
        feature = _load_feature(keys_ptr, place, exists, F)
        next_feature = _load_feature(keys_ptr, place + 1, has_next, F)
        is_last = exists & ((feature != next_feature) | ~has_next)
        tl.store(segments_ptr + 2 * feature.to(tl.int64) + 1, place + 1, mask=is_last)
        tl.store(segments_ptr + 2 * next_feature.to(tl.int64), place + 1, mask=is_last & has_next)


@triton.jit
def _segment(segments_ptr, feature):
    """Where the segment of a feature starts and ends in the order."""
    segment_ptr = segments_ptr + 2 * feature.to(tl.int64)
    start, end = tl.load(segment_ptr), tl.load(segment_ptr + 1)
    return start.to(tl.uint32, bitcast=True).to(tl.int64), end.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _load_row_ids(samples_ptr, p, end):
    """The rows of pairs p: those of their samples, or without samples the pairs' own."""
    if samples_ptr is None:
        return p.to(tl.int64)
    else:
        return tl.load(samples_ptr + p, mask=p < end, other=0).to(tl.int64)


@quick_launch
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["scale_ptr"])
def _sum_pairs_kernel(
    out_ptr,  # [F, D]
    pieces_ptr,  # [2 * windows + bias_windows, D]
    dots_ptr,  # [cdiv(D, BLOCK_D), P + bias_pairs], a tile's share of <weight[feature of p], rows[p]>; of bias unused
    rows_ptr,  # [B, width], the row of pair p at samples[p]; without samples [P, width], at p
    samples_ptr,  # [P + bias_pairs] or None
    coefs_ptr,  # [P + bias_pairs]
    keys_ptr,  # [P], see `OrderedPairs`
    segments_ptr,  # [F, 2]
    weight_ptr,  # [F, D]
    scale_ptr,  # 0-dim
    weight_stride,
    width,  # of rows: a multiple of 16 keeps them aligned even where D is none
    D,
    P: tl.int64,
    F,
    window,
    windows,
    bias_pairs,
    bias_window,
    bias_windows,
    by_pair,  # a program for every pair, and out is zero, instead of a program for every feature
    first_tile,  # the tile of out at which rows start
    SUMS: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS_POLICY: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS_IN_HALF: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    # Feature fastest: all features walk the same columns of rows while they sit in the L2 cache. The pieces of heavy
    # features, which take longest, go first.
    pid = tl.program_id(0)
    # As they were, but now the compiler knows: it splits accesses whose mask may end anywhere.
    D, weight_stride = D // ALIGN * ALIGN, weight_stride // ALIGN * ALIGN
    pieces = 2 * windows + bias_windows
    is_piece = pid < pieces
    if pid < 2 * windows:
        # A window meets at most two heavy features: one that reaches its start, one that reaches its end.
        first = (pid // 2).to(tl.int64) * window
        stop = tl.minimum(first + window, P)
        feature = _load_feature(keys_ptr, tl.where(pid % 2 == 0, first, stop - 1), True, F)
        start, end = _segment(segments_ptr, feature)
        active = (end - start > window) & ((pid % 2 == 0) | (start > first))
        start = tl.maximum(start, first)
        end = tl.minimum(end, stop)
    elif is_piece:
        feature = 0
        start = P + (pid - 2 * windows).to(tl.int64) * bias_window
        end = tl.minimum(start + bias_window, P + bias_pairs)
        active = start < end
    else:
        rank = pid - pieces
        feature = rank
        if by_pair:
            feature = _load_feature(keys_ptr, rank, True, F)
        start, end = _segment(segments_ptr, feature)
        active = (end - start <= window) & ((start == rank) | (by_pair == 0))
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    tile = tl.program_id(1)
    first_col = (first_tile + tile) * BLOCK_D
    # Compiled for a whole tile, and for half of one with twice the pairs where the last has no more columns. On an H200
    # (D=2304) that takes 5% from a step at K=32, 2% at K=128.
    is_half = ENDS_IN_HALF & (2 * (D - first_col) <= BLOCK_D)
    for HALF in tl.static_range(2 if ENDS_IN_HALF else 1):
        if active & (is_half == HALF):
            row_cols = tile * BLOCK_D + tl.arange(0, BLOCK_D // (1 + HALF))
            cols = first_tile * BLOCK_D + row_cols
            in_row, in_width = (cols < D) | EVEN_D, (row_cols < width) | EVEN_D
            PAIRS: tl.constexpr = BLOCK_P * (1 + HALF)
            out_row = feature.to(tl.int64)
            # weight and out are touched once: they leave the L2 cache to the rows.
            if DOTS:
                weight = tl.load(
                    (weight_ptr + out_row * weight_stride + cols)[None, :],
                    mask=in_row[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(dtype)
            total = tl.zeros([BLOCK_D // (1 + HALF)], dtype)
            # In 32 bits, which take half the registers.
            p, p_end = start.to(tl.uint32) + tl.arange(0, PAIRS), end.to(tl.uint32)
            row = _load_row_ids(samples_ptr, p, p_end)
            coef = tl.load(coefs_ptr + p, mask=p < p_end, other=0.0)
            for _ in range(0, (end - start).to(tl.int32), PAIRS):
                exists = (p < p_end) | (PAIRS == 1)
                x = tl.load(
                    rows_ptr + (row * width)[:, None] + row_cols[None, :],
                    mask=exists[:, None] & in_width[None, :],
                    other=0.0,
                    eviction_policy=ROWS_POLICY,
                ).to(dtype)
                # The next pairs are on their way before these rows are summed.
                next_p = p + PAIRS
                next_row = _load_row_ids(samples_ptr, next_p, p_end)
                next_coef = tl.load(coefs_ptr + next_p, mask=next_p < p_end, other=0.0)
                if SUMS:
                    total += tl.sum(coef[:, None] * x, axis=0)
                if DOTS:
                    dots_row_ptr = dots_ptr + tile.to(tl.int64) * (P + bias_pairs)
                    tl.store(dots_row_ptr + p, tl.sum(weight * x, axis=1), mask=exists)
                p, row, coef = next_p, next_row, next_coef
            if SUMS:
                if is_piece:
                    tl.store(pieces_ptr + pid.to(tl.int64) * D + cols, total, mask=in_row)
                else:
                    # The segment of a feature without pairs ends at 0: its zeros stay zeros whatever the scale is.
                    total *= tl.load(scale_ptr, mask=p_end > 0, other=0.0)
                    tl.store(out_ptr + out_row * D + cols, total, mask=in_row, eviction_policy="evict_first")


@quick_launch
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["scale_ptr"])
def _finish_kernel(
    out_ptr,  # [F, D], or None
    pieces_ptr,  # [2 * windows + bias_windows, D]
    bias_grad_ptr,  # [D], or None
    vals_grad_ptr,  # [B * K], or None
    dots_ptr,  # [dot_tiles, P + bias_pairs]
    units_ptr,  # [B], or None for units of 1
    samples_ptr,  # [P + bias_pairs], with units
    order_ptr,  # [P]
    keys_ptr,  # [P], see `OrderedPairs`
    segments_ptr,  # [F, 2]
    scale_ptr,  # 0-dim
    D,
    P: tl.int64,
    F,
    window,
    windows,
    bias_pairs,
    bias_windows,
    dot_tiles,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS_BLOCK_W: tl.constexpr,
    BIAS_BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    wait_for_memory()
    # Small jobs that share a launch: every program does a part of each.
    pid = tl.program_id(0)
    scale = tl.load(scale_ptr)
    if out_ptr is not None:  # loaded here, to be on their way during the first job
        w = pid % windows
        first = w.to(tl.int64) * window
        feature = _load_feature(keys_ptr, tl.minimum(first + window, P) - 1, True, F)
        start, end = _segment(segments_ptr, feature)
    if vals_grad_ptr is not None:
        p = pid.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        exists = p < P
        dot = tl.zeros([BLOCK_P], scale.dtype)
        for _ in range(dot_tiles):
            dot += tl.load(dots_ptr + p, mask=exists, other=0.0)
            dots_ptr += P + bias_pairs
        if units_ptr is not None:
            dot *= tl.load(units_ptr + tl.load(samples_ptr + p, mask=exists, other=0))
        tl.store(vals_grad_ptr + tl.load(order_ptr + p, mask=exists, other=0), dot * scale, mask=exists)
    if out_ptr is not None:
        # The window in which a heavy feature starts adds up its pieces. The feature is the last one of that window.
        tile_start = pid // windows * BLOCK_D
        if (end - start > window) & (start >= first) & (tile_start < D):
            cols = tile_start + tl.arange(0, BLOCK_D)
            in_row = cols < D
            total = tl.zeros([BLOCK_D], scale.dtype)
            last = ((end - 1) // window).to(tl.int32)
            for w0 in range(w, last + 1, BLOCK_W):
                ws = w0 + tl.arange(0, BLOCK_W)
                piece = 2 * ws.to(tl.int64) + tl.where((ws == w) & (start > first), 1, 0)
                mask = (ws <= last)[:, None] & in_row[None, :]
                rows = tl.load(pieces_ptr + (piece * D)[:, None] + cols[None, :], mask=mask, other=0.0)
                total += tl.sum(rows, axis=0)
            tl.store(out_ptr + feature.to(tl.int64) * D + cols, total * scale, mask=in_row)

    if bias_grad_ptr is not None:
        bias_first = pid.to(tl.int64) * BIAS_BLOCK_D
        bias_cols = bias_first + tl.arange(0, BIAS_BLOCK_D)
        if bias_first < D:
            bias_grad = tl.zeros([BIAS_BLOCK_D], scale.dtype)
            for w0 in range(0, bias_windows, BIAS_BLOCK_W):
                ws = w0 + tl.arange(0, BIAS_BLOCK_W)
                piece = 2 * windows + ws.to(tl.int64)
                mask = (ws < bias_windows)[:, None] & (bias_cols < D)[None, :]
                rows = tl.load(pieces_ptr + (piece * D)[:, None] + bias_cols[None, :], mask=mask, other=0.0)
                bias_grad += tl.sum(rows, axis=0)
            tl.store(bias_grad_ptr + bias_cols, bias_grad * scale, mask=bias_cols < D)


class OrderedPairs(NamedTuple):
    """The P = B * K pairs ordered by feature, those of one feature by their place in ``indices.flatten()``. A feature
    out of range counts as one in range, whose gradient becomes NaN with that of the sample."""

    # int16(feature - 2**15) up to F = 2**16, else int32(feature), features out of range included: `_load_feature` reads
    # them. Of one dtype, or another F would mean another compilation of kernels: int32 [P] is int16 [2 * P].
    keys: torch.Tensor
    order: torch.Tensor  # [P] int64, places in indices.flatten()
    segments: torch.Tensor  # [F, 2] uint32 (as int32), where a feature's pairs start and end; zeros if it has none
    # Those of bias, if it has pairs, come last: a val of 1 for each of the B samples, and the samples.
    coefs: torch.Tensor  # [P + B], vals in this order, times the units of their samples
    link: torch.Tensor  # [P + B] samples, order // K; or [B * K] slots, the inverse of order, uint32 (as int32)


def new_pairs(indices: torch.Tensor, F: int, dtype: torch.dtype, bias_pairs: int = 0, empty=new_empty) -> OrderedPairs:
    """Memory for the pairs, with ``coefs`` of ``dtype``."""
    P, (key_dtype, _) = indices.numel(), _key_format(F)
    return OrderedPairs(
        keys=empty(indices, P * key_dtype.itemsize // 2, dtype=torch.int16),
        order=empty(indices, P, dtype=torch.int64),
        segments=empty(indices, F, 2, dtype=torch.int32),
        coefs=empty(indices, P + bias_pairs, dtype=dtype),
        link=empty(indices, P + bias_pairs, dtype=torch.int32),
    )


def sort_pairs(pairs: OrderedPairs, indices: torch.Tensor) -> None:
    """Write ``keys`` and ``order`` from indices [B, K], contiguous; where pairs are few `gather_pairs` does."""
    F, P = pairs.segments.shape[0], indices.numel()
    if P <= _MAX_FEW:
        return
    dtype, key_shift = _key_format(F)
    unsorted, keys = new_empty(indices, P, dtype=dtype), pairs.keys.view(dtype)
    torch.sub(indices.view(P), key_shift, out=unsorted)
    if P <= _MAX_SORT:
        torch.sort(unsorted, stable=True, out=(keys, pairs.order))
    else:
        _merge([torch.sort(part, stable=True) for part in unsorted.split(_MAX_SORT)], F, keys, pairs.order)


def gather_pairs(
    pairs: OrderedPairs,
    indices: torch.Tensor,  # [B, K], contiguous
    vals: torch.Tensor,  # [B, K], contiguous
    units: torch.Tensor,  # [B], or empty for units of 1
    want_slots: bool,
) -> None:
    """Write, after `sort_pairs`, the rest of ``pairs``. ``link`` are the slots for rows that are yet to be written in
    this order, else the samples for rows that lie by sample."""
    K, P, bias_pairs = vals.shape[1], vals.numel(), _bias_pairs(pairs)
    few = P <= _MAX_FEW
    _gather_pairs_kernel[(cdiv(P + bias_pairs, _FEW_BLOCK if few else _FLAT_BLOCK),)](
        pairs.segments.zero_(),
        pairs.coefs,
        None if want_slots else pairs.link,
        pairs.link if want_slots else None,
        pairs.keys,
        pairs.order,
        indices,
        vals,
        units if units.numel() else None,
        P,
        K,
        pairs.segments.shape[0],
        bias_pairs,
        int(few),
        BLOCK=_FLAT_BLOCK,
        FEW_BLOCK=_FEW_BLOCK,
        FEW_BLOCK_OTHERS=_FEW_BLOCK_OTHERS,
    )


def _key_format(F):
    """The dtype of keys, and what is subtracted from features to make them."""
    return (torch.int16, 2**15) if _MAX_NARROW_F.value >= F else (torch.int32, 0)


def _merge(parts, F, merged_keys, merged_order):
    """Write one order, and its keys, from those of consecutive parts. (By torch's kernels: one of ours would be
    compiled when the first batch of such a size comes.)"""
    dtype, key_shift = _key_format(F)
    features = (torch.arange(F, device=merged_keys.device) - key_shift).to(dtype)
    # Where the pairs of each feature end in each part: [parts, F]. The last feature has those beyond it, too.
    ends = torch.stack([torch.searchsorted(keys, features, right=True) for keys, _ in parts])
    for end, (keys, _) in zip(ends, parts):
        end[-1] = keys.numel()
    counts = ends.diff(dim=1, prepend=ends.new_zeros(len(parts), 1))
    # A feature's pairs lie part after part: by how far each segment of each part moves.
    shifts = counts.sum(0).cumsum(0) - counts.sum(0) + counts.cumsum(0) - ends
    offset = 0
    for (keys, order), shift in zip(parts, shifts):
        for start in range(0, keys.numel(), _MERGE_BLOCK):
            block = keys[start : start + _MERGE_BLOCK]
            places = torch.arange(start, start + block.numel(), device=keys.device)
            places += shift[(block.long() + key_shift).clamp_(0, F - 1)]
            merged_keys[places] = block
            merged_order[places] = offset + order[start : start + _MERGE_BLOCK]
        offset += keys.numel()


def new_sums(pairs: OrderedPairs, weight: torch.Tensor) -> torch.Tensor:
    """Memory for the gradient of weight [F, D], as `pairs_summer` wants it."""
    return weight.new_zeros(weight.shape) if _is_sparse(pairs) else new_empty(weight, *weight.shape)


def _is_sparse(pairs):
    """Whether so few features have pairs that it pays to write zeros first and then look at pairs, not features."""
    return _SPARSE * pairs.order.numel() <= pairs.segments.shape[0]


def new_pieces(pairs: OrderedPairs, D: int) -> torch.Tensor:
    """Memory for the pieces of heavy features and of bias [2 * windows + bias_windows, D]."""
    (_, windows), (_, bias_windows) = _windows(pairs), _bias_windows(pairs)
    return new_empty(pairs.coefs, 2 * windows + bias_windows, D)


def _windows(pairs):
    P = pairs.order.numel()
    window = max(_MIN_WINDOW, cdiv(P, _MAX_WINDOWS))
    return window, cdiv(P, window)


def _bias_pairs(pairs):
    return pairs.coefs.numel() - pairs.order.numel()


def _bias_windows(pairs, wanted=True):
    bias_pairs = _bias_pairs(pairs) if wanted else 0
    # As many rows in a piece as there are pieces.
    window = max(1, math.isqrt(bias_pairs))
    return window, cdiv(bias_pairs, window)


def pairs_summer(
    pairs: OrderedPairs,
    rows: torch.Tensor,  # [B, width], or without samples [P, width], contiguous
    samples: Optional[torch.Tensor],  # [P + bias pairs]
    weight: torch.Tensor,  # [F, D]
    scale: torch.Tensor,  # 0-dim
    out: Optional[torch.Tensor],  # [F, D], of `new_sums`
    pieces: Optional[torch.Tensor],  # [2 * windows + bias_windows, D]
    dots: Optional[torch.Tensor] = None,  # [tiles, P + bias pairs]
    needs_bias: bool = False,
) -> Callable[[int], None]:
    """A function of ``first_column`` that writes ``out[f] = scale * sum of coefs[p] * rows[p]`` over the pairs of each
    feature f, but for heavy features and bias, whose ``pieces`` are left to `finish`, and ``dots[tile, p]``, a tile's
    share of ``<weight[f], rows[p]>``. What is None is left out. ``rows`` hold the columns of the whole from
    ``first_column`` on, and may end in columns that are no part of it: zeros if there are dots."""
    (F, D), P, width = weight.shape, pairs.order.numel(), rows.shape[1]
    (window, windows), (bias_window, bias_windows) = _windows(pairs), _bias_windows(pairs, needs_bias)
    by_pair = _is_sparse(pairs)
    block_d = min(SUM_BLOCK_D, next_power_of_2(width))
    programs = 2 * windows + bias_windows + (P if by_pair else F)
    weight_stride = weight.stride(0) if dots is not None else D  # else nothing of weight is read
    # Not where sums are float64: both forms together would spill registers.
    ends_in_half = scale.dtype == torch.float32 and 0 < D % block_d <= block_d // 2
    multiple, per_access = math.gcd(weight_stride, D), 16 // weight.element_size()
    args = (
        out,
        pieces,
        dots,
        rows,
        samples,
        pairs.coefs,
        pairs.keys,
        pairs.segments,
        weight,
        scale,
        weight_stride,
        width,
        D,
        P,
        F,
        window,
        windows,
        _bias_pairs(pairs),
        bias_window,
        bias_windows,
        int(by_pair),
    )
    constants = {
        "SUMS": out is not None,
        "DOTS": dots is not None,
        # A sample's row is read by many features, a row in the order by one.
        "ROWS_POLICY": "evict_first" if samples is None else "",
        # Of multiples of 16 the compiler knows, and code that tells it again is 5% slower.
        "ALIGN": per_access if multiple % per_access == 0 and multiple % 16 else 1,
        "ENDS_IN_HALF": ends_in_half,
        "EVEN_D": D % (block_d // 2 if ends_in_half else block_d) == 0,
        # Enough pairs at a time to keep a warp's loads busy. On an H200 a step takes up to 7% longer with others.
        "BLOCK_P": min(8, (2 * SUM_BLOCK_D if samples is None else SUM_BLOCK_D) // block_d),
        "BLOCK_D": block_d,
    }

    def sum_pairs(first_column):
        grid = (programs, cdiv(min(width, D - first_column), block_d))
        _sum_pairs_kernel[grid](*args, first_column // block_d, **constants, num_warps=1)

    return sum_pairs


def finish(
    pairs: OrderedPairs,
    scale: torch.Tensor,  # 0-dim
    out: Optional[torch.Tensor],  # [F, D]
    pieces: Optional[torch.Tensor],  # [2 * windows + bias_windows, D]
    bias_grad: Optional[torch.Tensor] = None,  # [D], only with out
    vals_grad: Optional[torch.Tensor] = None,  # [B, K], contiguous
    dots: Optional[torch.Tensor] = None,  # [tiles, P + bias pairs]
    units: Optional[torch.Tensor] = None,  # [B], of the rows in ``dots``, or empty for units of 1
) -> None:
    """Write the rows of ``out`` of heavy features and ``bias_grad`` from ``pieces``, and ``vals_grad[order[p]] =
    scale * dots[:, p].sum()``, times the unit of p's sample. What is None is left out."""
    P, (window, windows) = pairs.order.numel(), _windows(pairs)
    D = out.shape[1] if out is not None else 1
    has_units = units is not None and units.numel() > 0
    block_d = min(_FINISH_BLOCK_D, next_power_of_2(D))
    pieces_programs = 0 if out is None else windows * cdiv(D, block_d)
    dots_programs = 0 if dots is None else cdiv(P, _FINISH_BLOCK_P)
    bias_programs = 0 if bias_grad is None else cdiv(D, _BIAS_BLOCK_D)
    _finish_kernel[(max(pieces_programs, dots_programs, bias_programs),)](
        out,
        pieces,
        bias_grad,
        vals_grad,
        dots,
        units if has_units else None,
        pairs.link if has_units else None,
        pairs.order,
        pairs.keys,
        pairs.segments,
        scale,
        D,
        P,
        pairs.segments.shape[0],
        window,
        windows,
        _bias_pairs(pairs),
        _bias_windows(pairs)[1],
        dots.shape[0] if dots is not None else 0,
        BLOCK_W=_FINISH_BLOCK_W,
        BLOCK_D=block_d,
        BIAS_BLOCK_W=_BIAS_BLOCK_W,
        BIAS_BLOCK_D=_BIAS_BLOCK_D,
        BLOCK_P=_FINISH_BLOCK_P,
        num_warps=1,
    )

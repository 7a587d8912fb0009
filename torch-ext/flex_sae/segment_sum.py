"""Sums over the pairs of each feature: the gradient of a dictionary's rows.

    out[f] = scale * sum over pairs p of feature f of coefs[p] * rows[p]

With the pairs ordered by feature each row of ``out`` is the sum of one segment: summed in registers in a fixed order
and written once. No float atomics, no zero fill, the same bits every run. On the way through the rows of its pairs a
feature can take the dot products <weight[f], rows[p]>, the gradient of vals.

Dictionaries are skewed: one feature may hold a large part of all pairs. The order is therefore divided into chunks, and
a feature of more pairs than a chunk, a heavy one, is cut where chunks end. Each part has a program of its own that
writes a partial sum, and a second kernel adds those of a feature in order.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from .launch import cached_launch
from .ordering import OrderedPairs
from .tiles import cdiv, next_power_of_2, unit_stride_rows

# Bytes of a row of sums that a program, one warp, takes: 512 columns of float32. On an H200 (B=4096, F=65536, D=2304) a
# TopK step takes 0.61, 0.57, 0.67 ms at K=32 and 1.29, 1.23, 1.35 at K=128 with 256, 512, 1024 columns.
_ROW_BYTES = 2048
# Pairs of a chunk, more where chunks would be too many. On an H200 (B=4096, F=65536, D=2304, K=32) a TopK step takes
# 0.50, 0.55, 0.65 ms with 128, 256, 512 for Zipf(1) indices; 0.575, 0.573, 0.572 for uniform ones.
_MIN_CHUNK = 128
# Chunks at most, so that partial sums take at most [2 * _MAX_CHUNKS, D] whatever B and K are. At K=128 it takes 1.34,
# 1.19, 1.14 ms with 512, 1024, 2048 for Zipf(1) indices; 1.23 for uniform ones.
_MAX_CHUNKS = 2048
# Partial sums, and bytes of a row of them, that a program, four warps, adds at a time. Most programs find no heavy
# feature: on an H100 (B=4096, K=128, D=2304, uniform) they take 5 us, and 12 with 256 columns and one warp.
_REDUCE_BLOCK_C, _REDUCE_ROW_BYTES = 4, 4096
# Pairs of a program, four warps, that adds up dot products. There 128 take 13 us, 256 take 15.
_DOTS_BLOCK_P = 128
# Features of a program, four warps, that adds up coefficients, and pairs of each at a time: 18 us on an H100 (B=4096,
# K=64, F=65536), and a feature that is active in all samples takes 32 rounds. Others were not tried.
_COEFS_BLOCK_F, _COEFS_BLOCK_P = 8, 128
# Arguments that must not compile a kernel again: what another B or F changes, and the first tile
_SIZES = ("P", "chunk", "chunks", "first_tile")


@triton.jit
def _load_segment(segments_ptr, feature):
    """Where the pairs of a feature start and end in the order."""
    segment_ptr = segments_ptr + 2 * feature.to(tl.int64)
    return tl.load(segment_ptr), tl.load(segment_ptr + 1)


@triton.jit
def _load_row_ids(samples_ptr, p, end):
    """The rows of pairs p: those of their samples, or without samples the pairs' own."""
    if samples_ptr is None:
        return p.to(tl.int64)
    else:
        return tl.load(samples_ptr + p, mask=p < end, other=0).to(tl.int64)


@triton.jit
def _sum_segment(
    out_ptr,  # [columns], or None
    partial_ptr,  # [columns], or None
    dots_ptr,  # [P], or None
    weight_ptr,  # [columns], or None
    rows_ptr,  # [N, row_stride]
    samples_ptr,  # [P], or None
    coefs_ptr,  # [P]
    scale_ptr,  # 0-dim
    row_stride,
    start,
    end,
    is_partial,
    columns,
    FULL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum and the dot products of the pairs from start to end, for one tile of columns; FULL: of all its columns.
    All pointers point to its first column."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    in_row = (cols < columns) | FULL
    dtype: tl.constexpr = coefs_ptr.dtype.element_ty
    # weight, out and rows in the order are touched once: they leave the L2 cache to the rows of samples.
    rows_policy: tl.constexpr = "evict_first" if samples_ptr is None else ""
    if dots_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0, eviction_policy="evict_first").to(dtype)
    total = tl.zeros([BLOCK_D], dtype)
    p = start + tl.arange(0, BLOCK_P)
    row = _load_row_ids(samples_ptr, p, end)
    coef = tl.load(coefs_ptr + p, mask=p < end, other=0.0)
    for _ in range(start, end, BLOCK_P):
        exists = (p < end) | (BLOCK_P == 1)
        x_ptrs = rows_ptr + (row * row_stride)[:, None] + cols
        x = tl.load(x_ptrs, mask=exists[:, None] & in_row, other=0.0, eviction_policy=rows_policy).to(dtype)
        # Prefetch the next pairs.
        next_p = p + BLOCK_P
        next_row = _load_row_ids(samples_ptr, next_p, end)
        next_coef = tl.load(coefs_ptr + next_p, mask=next_p < end, other=0.0)
        if out_ptr is not None:
            total += tl.sum(coef[:, None] * x, axis=0)
        if dots_ptr is not None:
            tl.store(dots_ptr + p, tl.sum(weight * x, axis=1), mask=exists)
        p, row, coef = next_p, next_row, next_coef
    if out_ptr is not None:
        if is_partial:  # scaled once all parts are added up
            tl.store(partial_ptr + cols, total[None, :], mask=in_row)
        else:
            # The row of a feature without pairs stays zero whatever the scale is.
            total *= tl.load(scale_ptr, mask=end > start, other=0.0)
            tl.store(out_ptr + cols, total[None, :], mask=in_row, eviction_policy="evict_first")


@cached_launch
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["scale_ptr"])
def _segment_sum_kernel(
    out_ptr,  # [F, D], or None
    partials_ptr,  # [2 * chunks, D], or None
    dots_ptr,  # [cdiv(D, BLOCK_D), P], or None: a tile's share of <weight[feature of p], rows[p]>
    weight_ptr,  # [F, D], or None
    rows_ptr,  # [B, row_stride], the row of pair p at samples[p]; without samples [P, row_stride], at p
    samples_ptr,  # [P], or None
    coefs_ptr,  # [P]
    features_ptr,  # [P]
    segments_ptr,  # [F, 2]
    scale_ptr,  # 0-dim
    weight_stride,
    row_stride,
    P,
    chunk,
    chunks,
    first_tile,  # the tile of out at which rows start
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Feature fastest: all features walk the same columns of rows while they sit in the L2 cache. Parts of heavy
    # features, which take longest, go first.
    pid = tl.program_id(0)
    is_partial = pid < 2 * chunks
    if is_partial:
        # A chunk meets at most two heavy features: one that reaches its start, one that reaches its end.
        first = pid // 2 * chunk
        stop = tl.minimum(first + chunk, P)
        feature = tl.load(features_ptr + tl.where(pid % 2 == 0, first, stop - 1))
        start, end = _load_segment(segments_ptr, feature)
        active = (end - start > chunk) & ((pid % 2 == 0) | (start > first))
        start, end = tl.maximum(start, first), tl.minimum(end, stop)
    else:
        feature = pid - 2 * chunks
        start, end = _load_segment(segments_ptr, feature)
        active = end - start <= chunk
    tile = tl.program_id(1)
    first_col = (first_tile + tile) * BLOCK_D
    rows_ptr += tile * BLOCK_D
    if out_ptr is not None:
        out_ptr += feature.to(tl.int64) * D + first_col
        partials_ptr += pid.to(tl.int64) * D + first_col
    if dots_ptr is not None:
        dots_ptr += (first_tile + tile).to(tl.int64) * P
        weight_ptr += feature.to(tl.int64) * weight_stride + first_col
    # Where half a tile is enough for the last columns it takes twice the pairs at a time: 11 to 14% of a step at D=768.
    HALF: tl.constexpr = BLOCK_D // 2
    ENDS_IN_HALF: tl.constexpr = D % BLOCK_D > 0 and D % BLOCK_D <= HALF
    FULL: tl.constexpr = D % (HALF if ENDS_IN_HALF else BLOCK_D) == 0
    if active:
        if ENDS_IN_HALF and D - first_col <= HALF:
            _sum_segment(
                out_ptr, partials_ptr, dots_ptr, weight_ptr, rows_ptr, samples_ptr, coefs_ptr, scale_ptr,
                row_stride, start, end, is_partial, D - first_col, FULL, 2 * BLOCK_P, HALF,
            )  # fmt: skip
        else:
            _sum_segment(
                out_ptr, partials_ptr, dots_ptr, weight_ptr, rows_ptr, samples_ptr, coefs_ptr, scale_ptr,
                row_stride, start, end, is_partial, D - first_col, FULL, BLOCK_P, BLOCK_D,
            )  # fmt: skip


@cached_launch
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["scale_ptr"])
def _reduce_partials_kernel(
    out_ptr,  # [F, D]
    partials_ptr,  # [2 * chunks, D]
    features_ptr,  # [P]
    segments_ptr,  # [F, 2]
    scale_ptr,  # 0-dim
    P,
    chunk,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The chunk in which a heavy feature starts adds up its partial sums. The feature is the last one of that chunk.
    c = tl.program_id(0)
    first = c * chunk
    feature = tl.load(features_ptr + tl.minimum(first + chunk, P) - 1)
    start, end = _load_segment(segments_ptr, feature)
    if (end - start > chunk) & (start >= first):
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = cols < D
        total = tl.zeros([BLOCK_D], scale_ptr.dtype.element_ty)
        last = (end - 1) // chunk
        for first_id in range(c, last + 1, BLOCK_C):
            chunk_id = first_id + tl.arange(0, BLOCK_C)
            row = 2 * chunk_id.to(tl.int64) + tl.where((chunk_id == c) & (start > first), 1, 0)
            mask = (chunk_id <= last)[:, None] & in_row[None, :]
            total += tl.sum(tl.load(partials_ptr + (row * D)[:, None] + cols[None, :], mask=mask, other=0.0), axis=0)
        tl.store(out_ptr + feature.to(tl.int64) * D + cols, total * tl.load(scale_ptr), mask=in_row)


@cached_launch
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["scale_ptr"])
def _sum_dots_kernel(
    vals_grad_ptr,  # [P]
    dots_ptr,  # [tiles, P]
    order_ptr,  # [P]
    scale_ptr,  # 0-dim
    P,
    tiles,
    BLOCK_P: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < P
    pair = tl.load(order_ptr + p, mask=exists, other=0)
    dot = tl.zeros([BLOCK_P], dots_ptr.dtype.element_ty)
    for _ in range(tiles):
        dot += tl.load(dots_ptr + p, mask=exists, other=0.0)
        dots_ptr += P
    tl.store(vals_grad_ptr + pair, dot * tl.load(scale_ptr), mask=exists)


@cached_launch
@triton.jit(do_not_specialize=["F"])
def _sum_coefs_kernel(
    sums_ptr,  # [F]
    coefs_ptr,  # [P]
    segments_ptr,  # [F, 2]
    F,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    segment_ptrs = segments_ptr + 2 * feature.to(tl.int64)
    start = tl.load(segment_ptrs, mask=feature < F, other=0)
    end = tl.load(segment_ptrs + 1, mask=feature < F, other=0)
    total = tl.zeros([BLOCK_F], coefs_ptr.dtype.element_ty)
    for first in range(0, tl.max(end - start), BLOCK_P):
        place = first + tl.arange(0, BLOCK_P)[None, :]  # within the segment, so that none overflows
        mask = place < (end - start)[:, None]
        total += tl.sum(tl.load(coefs_ptr + start[:, None] + place, mask=mask, other=0.0), axis=1)
    tl.store(sums_ptr + feature, total, mask=feature < F)


def sum_coefs(pairs: OrderedPairs, out: torch.Tensor) -> None:
    """Write the sum of each feature's coefficients to ``out`` [F]: the same bits every run."""
    F = len(out)
    _sum_coefs_kernel[(cdiv(F, _COEFS_BLOCK_F),)](
        out, pairs.coefs, pairs.segments, F, BLOCK_F=_COEFS_BLOCK_F, BLOCK_P=_COEFS_BLOCK_P
    )


class SegmentSum:
    """The sums over the pairs of each feature. Rows may arrive some columns at a time.

    Args:
        pairs: the order, and the coefficients.
        scale: 0-dim, of the dtype of the coefficients, in which everything is computed.
        D: the number of columns in all.
        out: ``[F, D]``, for the sums; or None.
        vals_grad: ``[B, K]`` or ``[P]``, for ``scale * <weight[feature], rows[pair]>``; or None.
        weight: ``[F, D]``, read for vals_grad alone.
        part_columns: the columns that arrive at a time, or that a program takes at most: all, or a power of two.
    """

    def __init__(
        self,
        pairs: OrderedPairs,
        scale: torch.Tensor,
        D: int,
        out: Optional[torch.Tensor] = None,
        vals_grad: Optional[torch.Tensor] = None,
        weight: Optional[torch.Tensor] = None,
        part_columns: Optional[int] = None,
    ):
        self._pairs, self._scale, self._D, self._out, self._vals_grad = pairs, scale, D, out, vals_grad
        P = pairs.order.numel()
        self._chunk = max(_MIN_CHUNK, cdiv(P, _MAX_CHUNKS))
        self._chunks = cdiv(P, self._chunk)
        full_tile = _ROW_BYTES // scale.itemsize
        self._block_d = min(full_tile, next_power_of_2(part_columns or D))
        # Enough pairs at a time to keep a warp's loads busy. On an H200 a step takes up to 7% longer with others.
        self._block_p = min(8, (2 if pairs.samples is None else 1) * full_tile // self._block_d)
        self._partials = self._dots = self._weight = None
        if out is not None:
            self._partials = scale.new_empty(2 * self._chunks, D)
        if vals_grad is not None:
            self._weight = unit_stride_rows(weight)
            self._dots = scale.new_empty(cdiv(D, self._block_d), P)

    def add(self, rows: torch.Tensor, first_column: int = 0) -> None:
        """Take the columns of ``rows`` as those from ``first_column`` on. ``rows`` are ``[N, columns]``, of which a
        pair takes row ``samples[p]``, or if the pairs have no samples ``[P, columns]``, one for each pair in the order.
        Columns have unit stride; those beyond D are not read."""
        pairs, columns = self._pairs, min(rows.shape[1], self._D - first_column)
        P, F = pairs.order.numel(), pairs.segments.shape[0]
        _segment_sum_kernel[(2 * self._chunks + F, cdiv(columns, self._block_d))](
            self._out,
            self._partials,
            self._dots,
            self._weight,
            rows,
            pairs.samples,
            pairs.coefs,
            pairs.features,
            pairs.segments,
            self._scale,
            0 if self._weight is None else self._weight.stride(0),
            rows.stride(0),
            P,
            self._chunk,
            self._chunks,
            first_column // self._block_d,
            D=self._D,
            BLOCK_P=self._block_p,
            BLOCK_D=self._block_d,
            num_warps=1,
        )

    def finish(self) -> None:
        """Once all rows are added: write the rows of ``out`` of heavy features, and ``vals_grad``."""
        pairs, scale, D = self._pairs, self._scale, self._D
        P = pairs.order.numel()
        if self._out is not None:
            block_d = min(_REDUCE_ROW_BYTES // scale.itemsize, next_power_of_2(D))
            _reduce_partials_kernel[(self._chunks, cdiv(D, block_d))](
                self._out,
                self._partials,
                pairs.features,
                pairs.segments,
                scale,
                P,
                self._chunk,
                D=D,
                BLOCK_C=_REDUCE_BLOCK_C,
                BLOCK_D=block_d,
            )
        if self._vals_grad is not None:
            _sum_dots_kernel[(cdiv(P, _DOTS_BLOCK_P),)](
                self._vals_grad,
                self._dots,
                pairs.order,
                scale,
                P,
                self._dots.shape[0],
                BLOCK_P=_DOTS_BLOCK_P,
            )

"""Replica rows, which spread the atomic additions to a heavy feature.

Atomic additions to one address wait for each other, and dictionaries are skewed: one feature may be in every sample. A
feature of many pairs therefore gets replicas of its row of the gradient, which lie behind the F rows of all features.
Samples that run at the same time add to different replicas, and a last kernel sums them.

A table of F + 1 + _MAX_REPLICAS numbers says who has how many:

    for each feature 0, or if it has replicas (first replica << _BITS) + (number of replicas - 1);
    the number of all replicas;
    for each replica its feature plus 1 if it is the feature's first, else 0.
"""

import torch
import triton
import triton.language as tl

from .launch import cached_launch
from .tiles import cdiv, next_power_of_2

# One replica per 128 pairs, rounded down to a power of two; below two, none. On an H200 with Zipf(1) indices (B=4096,
# F=65536, D=2304) a step at K=32 takes 0.90, 0.94, 1.03 ms with 128, 256, 512, and 1.35 without replicas.
_PAIRS = 128
# Replicas at most, so that they take at most [_MAX_REPLICAS, D] whatever B and K are; beyond, each takes more pairs. At
# K=128 it takes 3.00, 2.75, 2.61 ms with 512, 1024, 2048, and 3.18 without.
_BITS = tl.constexpr(11)
_MAX_REPLICAS = 2**_BITS.value
# Features of a program that assigns replicas
_ASSIGN_BLOCK_F = 1024
# Replicas and columns of a program that sums them. Where no feature is heavy they take 2.6 us on an H200 (B=4096,
# K=128), and 7.3 with one program per replica.
_SUM_BLOCK_R, _SUM_BLOCK_D = 4, 512


@triton.jit
def count_pairs(
    counts_ptr,  # [F]
    indices_ptr,  # [B, K]
    b,
    K,
    F,
    BLOCK_K: tl.constexpr,
):
    """Add the pairs of sample b to the counts of their features."""
    for start in range(0, K, BLOCK_K):
        steps = start + tl.arange(0, BLOCK_K)
        feature = tl.load(indices_ptr + b * K + steps, mask=steps < K, other=-1).to(tl.int64)
        tl.atomic_add(counts_ptr + feature, 1, mask=(feature >= 0) & (feature < F), sem="relaxed")


@triton.jit
def replica_row(
    table_ptr,  # [F + 1 + _MAX_REPLICAS]
    b,
    feature,
    valid,
    F,
):
    """The rows that sample b adds to for some features: their own, or a replica of each."""
    entry = tl.load(table_ptr + feature, mask=valid, other=0)
    # Samples next to each other run at the same time.
    replica = (entry >> _BITS) + (b.to(tl.int32) & entry & (2**_BITS - 1))
    return tl.where(entry > 0, F + replica.to(tl.int64), feature)


@cached_launch
@triton.jit(do_not_specialize=["F", "pairs"])
def _assign_replicas_kernel(
    table_ptr,  # [F + 1 + _MAX_REPLICAS], zeros
    counts_ptr,  # [F]
    F,
    pairs,
    BLOCK_F: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    exists = feature < F
    wanted = tl.load(counts_ptr + feature, mask=exists, other=0) // pairs
    replicas = tl.full([BLOCK_F], 1, tl.int32)
    while tl.max(wanted, axis=0) >= 2:
        replicas = tl.where(wanted >= 2, 2 * replicas, replicas)
        wanted //= 2
    is_heavy = replicas >= 2
    total_ptrs = table_ptr + F + tl.zeros([BLOCK_F], tl.int64)
    first = tl.atomic_add(total_ptrs, replicas, mask=is_heavy, sem="relaxed")
    tl.store(table_ptr + feature, (first << _BITS) + replicas - 1, mask=is_heavy)
    tl.store(total_ptrs + 1 + first, feature + 1, mask=is_heavy)


@cached_launch
@triton.jit(do_not_specialize=["F"])
def _sum_replicas_kernel(
    rows_ptr,  # [F + replicas, D]
    table_ptr,  # [F + 1 + _MAX_REPLICAS]
    F,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0) * BLOCK_R
    owners_ptr = table_ptr + F + 1
    if tl.max(tl.load(owners_ptr + begin + tl.arange(0, BLOCK_R)), axis=0) > 0:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = cols < D
        for first in range(begin, begin + BLOCK_R):
            feature = tl.load(owners_ptr + first) - 1
            if feature >= 0:
                replicas = (tl.load(table_ptr + feature) & (2**_BITS - 1)) + 1
                total = tl.zeros([BLOCK_D], rows_ptr.dtype.element_ty)
                for start in range(0, replicas, BLOCK_R):
                    replica = start + tl.arange(0, BLOCK_R)
                    mask = (replica < replicas)[:, None] & in_row[None, :]
                    row = (F + (first + replica).to(tl.int64))[:, None]
                    total += tl.sum(tl.load(rows_ptr + row * D + cols[None, :], mask=mask, other=0.0), axis=0)
                # Nothing was added to the feature's own row.
                tl.store(rows_ptr + feature.to(tl.int64) * D + cols, total, mask=in_row)


class Replicas:
    """Zeros to add to, ``rows`` [F + replicas, D], and the replica ``table``, from the ``counts`` [F] of each feature's
    pairs, B * K in all."""

    def __init__(self, counts: torch.Tensor, B: int, K: int, D: int, dtype: torch.dtype):
        F, pairs = counts.numel(), max(_PAIRS, cdiv(B * K, _MAX_REPLICAS))
        self.table = counts.new_zeros(F + 1 + _MAX_REPLICAS)
        self.rows = counts.new_zeros(F + B * K // pairs, D, dtype=dtype)
        _assign_replicas_kernel[(cdiv(F, _ASSIGN_BLOCK_F),)](self.table, counts, F, pairs, BLOCK_F=_ASSIGN_BLOCK_F)

    def sum(self) -> torch.Tensor:
        """The gradient of all features [F, D], once everything is added. It shares the memory of ``rows``."""
        D = self.rows.shape[1]
        F = self.table.numel() - 1 - _MAX_REPLICAS
        replicas, block_d = self.rows.shape[0] - F, min(_SUM_BLOCK_D, next_power_of_2(D))
        if replicas:
            grid = (cdiv(replicas, _SUM_BLOCK_R), cdiv(D, block_d))
            _sum_replicas_kernel[grid](self.rows, self.table, F, D=D, BLOCK_R=_SUM_BLOCK_R, BLOCK_D=block_d)
        return self.rows[:F]

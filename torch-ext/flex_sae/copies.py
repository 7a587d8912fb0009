"""Several rows for a heavy feature to add to.

Atomic additions to one address wait for each other, and dictionaries are skewed: one feature may be in every sample. A
feature of many pairs is therefore heavy and has copies of its row of the gradient, which lie behind the F rows of all
features. Samples that run at the same time add to different copies, and a last kernel sums them.

The plan says which features have copies. Its F + 1 + _MAX_COPIES numbers are

    for each feature, at first the count of its pairs; then, if it is heavy, its first copy and its copies less one, in
    the upper bits and the lower _BITS bits, else 0;
    the copies of all features;
    for each copy, the feature plus 1 if it is the feature's first, else 0.
"""

import functools

import torch
import triton
import triton.language as tl

from .checks import cdiv, next_power_of_2
from .launch import quick_launch, wait_for_memory

# A feature has a copy for every so many of its pairs, but always a power of two of them, and not just one. On an H200
# with Zipf(1) indices (B=4096, F=65536, D=2304) a step at K=32 takes 0.90, 0.94, 1.03 ms with 128, 256, 512, and 1.35
# without copies.
_COPY_PAIRS = 128
# Copies at most, so that they take at most [_MAX_COPIES, D] whatever B and K are. At K=128 it takes 3.00, 2.75, 2.61
# ms with 512, 1024, 2048, and 3.18 without.
_BITS = tl.constexpr(11)
_MAX_COPIES = 2**_BITS.value
# Features of a program that makes the plan.
_PLAN_BLOCK = 1024
# Copies and columns of a program that sums copies, and that it sums at a time. Where no feature is heavy they take 2.6
# us on an H200 (B=4096, K=128), a program for each copy 7.3.
_SUM_BLOCK_C, _SUM_BLOCK_D = 4, 512


@triton.jit
def count_pairs(
    plan_ptr,  # [F + 1 + _MAX_COPIES]
    indices_ptr,  # [B, K]
    b,
    tile,
    K,
    F,
    active,
    BLOCK_K: tl.constexpr,
):
    """For a program of a forward kernel: count the pairs of sample b, if its tile is the first."""
    if (tile == 0) & (active != 0):
        for start in range(0, K, BLOCK_K):
            steps = start + tl.arange(0, BLOCK_K)
            feature = tl.load(indices_ptr + b * K + steps, mask=steps < K, other=-1).to(tl.int64)
            tl.atomic_add(plan_ptr + feature, 1, mask=(feature >= 0) & (feature < F), sem="relaxed")


@quick_launch
@triton.jit(do_not_specialize=["F", "copy_pairs"])
def _plan_copies_kernel(
    plan_ptr,  # [F + 1 + _MAX_COPIES]
    F,
    copy_pairs,
    BLOCK: tl.constexpr,
):
    wait_for_memory()
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = feature < F
    wanted = tl.load(plan_ptr + feature, mask=exists, other=0) // copy_pairs
    copies = tl.full([BLOCK], 1, tl.int32)
    while tl.max(wanted, axis=0) >= 2:
        copies = tl.where(wanted >= 2, 2 * copies, copies)
        wanted //= 2
    is_heavy = copies >= 2
    total_ptr = plan_ptr + F + tl.zeros([BLOCK], tl.int64)
    first = tl.atomic_add(total_ptr, copies, mask=is_heavy, sem="relaxed")
    tl.store(plan_ptr + feature, tl.where(is_heavy, (first << _BITS) + copies - 1, 0), mask=exists)
    tl.store(total_ptr + 1 + first, (feature + 1).to(tl.int32), mask=is_heavy)


@triton.jit
def row_to_add_to(
    plan_ptr,  # [F + 1 + _MAX_COPIES]
    b,
    feature,
    valid,
    F,
):
    """The rows of some features of sample b, or of a copy of each."""
    planned = tl.load(plan_ptr + feature, mask=valid, other=0)
    # Samples next to each other run at the same time.
    copy = (planned >> _BITS) + (b.to(tl.int32) & planned & (2**_BITS - 1))
    return tl.where(planned > 0, F + copy.to(tl.int64), feature)


@quick_launch
@triton.jit(do_not_specialize=["F"])
def _sum_copies_kernel(
    rows_ptr,  # [F + copies, D]
    plan_ptr,  # [F + 1 + _MAX_COPIES]
    F,
    D,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    begin = tl.program_id(0) * BLOCK_C
    owners_ptr = plan_ptr + F + 1
    if tl.max(tl.load(owners_ptr + begin + tl.arange(0, BLOCK_C)), axis=0) > 0:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = cols < D
        for first in range(begin, begin + BLOCK_C):
            feature = tl.load(owners_ptr + first) - 1
            if feature >= 0:
                copies = (tl.load(plan_ptr + feature) & (2**_BITS - 1)) + 1
                total = tl.zeros([BLOCK_D], rows_ptr.dtype.element_ty)
                for start in range(0, copies, BLOCK_C):
                    copy = start + tl.arange(0, BLOCK_C)
                    mask = (copy < copies)[:, None] & in_row[None, :]
                    row = (F + (first + copy).to(tl.int64))[:, None]
                    total += tl.sum(tl.load(rows_ptr + row * D + cols[None, :], mask=mask, other=0.0), axis=0)
                # Nothing was added to the feature's row itself.
                tl.store(rows_ptr + feature.to(tl.int64) * D + cols, total, mask=in_row)


def new_plan(indices: torch.Tensor, F: int) -> torch.Tensor:
    """A plan of zeros: no feature has copies, and no pair is counted yet."""
    return indices.new_zeros(F + 1 + _MAX_COPIES, dtype=torch.int32)


def needs_copies(B: int, K: int) -> bool:
    """Whether a feature may have copies, so that pairs have to be counted."""
    _, copies = _copies(B, K)
    return copies > 0


def plan_copies(plan: torch.Tensor, B: int, K: int) -> None:
    """Make the plan from the counts of all pairs."""
    copy_pairs, copies = _copies(B, K)
    if copies:
        F = plan.numel() - 1 - _MAX_COPIES
        _plan_copies_kernel[(cdiv(F, _PLAN_BLOCK),)](plan, F, copy_pairs, BLOCK=_PLAN_BLOCK)


def new_rows(weight: torch.Tensor, B: int, K: int) -> torch.Tensor:
    """Zeros to add to [F + copies, D], for all copies that a plan can ask for."""
    F, D = weight.shape
    _, copies = _copies(B, K)
    return weight.new_zeros(F + copies, D)


def sum_copies(
    rows: torch.Tensor,  # [F + copies, D]
    plan: torch.Tensor,
) -> torch.Tensor:
    """The rows of all features [F, D], in the same memory."""
    F, D = plan.numel() - 1 - _MAX_COPIES, rows.shape[1]
    copies, block_d = rows.shape[0] - F, min(_SUM_BLOCK_D, next_power_of_2(D))
    if not copies:
        _compile_for_larger_batches(rows.device, rows.dtype, F, D, block_d)
        return rows
    grid = (cdiv(copies, _SUM_BLOCK_C), cdiv(D, block_d))
    _sum_copies_kernel[grid](rows, plan, F, D, BLOCK_C=_SUM_BLOCK_C, BLOCK_D=block_d)
    return rows[:F]


@functools.cache
def _compile_for_larger_batches(device, dtype, F, D, block_d):
    """Compile what a small batch does not launch with the rest, so that no later batch waits for a compiler."""
    _plan_copies_kernel.warmup(torch.int32, F, _COPY_PAIRS, BLOCK=_PLAN_BLOCK, grid=(1,))
    _sum_copies_kernel.warmup(dtype, torch.int32, F, D, BLOCK_C=_SUM_BLOCK_C, BLOCK_D=block_d, grid=(1,))


def _copies(B, K):
    """The pairs that share a copy, and the copies of all features at most. Where even a feature of every sample would
    have fewer than four, there are 0: they would not be worth their launches."""
    copy_pairs = max(_COPY_PAIRS, cdiv(B * K, _MAX_COPIES))
    return copy_pairs, cdiv(B * K, copy_pairs) if 4 * copy_pairs <= B else 0

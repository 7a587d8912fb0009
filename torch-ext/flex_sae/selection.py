"""The k largest elements of each row, exactly, in the order of torch.sort(descending=True, stable=True).

A row is cut into groups of neighbours. One pass over it takes the maximum of each group. The k largest elements lie in
the k groups with the largest maxima: any other element is preceded by those k maxima. So k elements are chosen twice,
once among the maxima and once among the elements of the chosen groups, both times by bisection: halve the range of the
threshold until k elements reach it, or until it is one value, of which the first ones are taken. Elements are compared
as integers in the order of floats: NaN is the largest, zeros of both signs are equal.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import cached_launch
from .tiles import cdiv

# Beyond this k, torch.topk is as fast for small dictionaries. On an H100 (R=1024, F=65536, float32) 0.14, 0.16, 0.24,
# 0.71 ms at k = 64, 128, 256, 512; torch.topk of relu takes 1.07 to 1.10.
_MAX_K = 256
# Up to this F a larger k sorts whole rows, no slower than torch.topk: R=1024 rows of F=4096 take 0.16 ms.
_MAX_SORTED = 4096
# Elements of a group. 16 and 64 are slower.
_GROUP = 32
# Groups of a program, four warps, that takes maxima: at the speed of DRAM in float32. In bfloat16 128 take 10% longer.
_BLOCK_G = 64
# Bytes of keys that a row's program, four warps, looks at together. 2 and 8 KiB are up to 20% slower.
_BLOCK_BYTES = 4096
# Bytes of keys that get their ranks at a time, and keys that each is compared with. Half as many bytes are as fast at
# k=64, and 10% slower at 256.
_RANK_BYTES, _RANK_BLOCK_J = 256, 32


@triton.jit
def _lowest(dtype: tl.constexpr):
    """Below the key of every float."""
    return tl.full([], -(2 ** (dtype.primitive_bitwidth - 1)), dtype)


@triton.jit
def _keys(x, dtype: tl.constexpr):
    """Integers in the order of the floats x."""
    double: tl.constexpr = x.dtype == tl.float64
    wide = x if double else x.to(tl.float32)
    bits = wide.to(dtype, bitcast=True)
    keys = tl.where(bits < 0, _lowest(dtype) - bits, bits)  # negative floats order backwards
    keys = tl.where(wide != wide, 2 ** (dtype.primitive_bitwidth - 1) - 1, keys)
    # A 16-bit float leaves the last bits zero: bisection takes 14 passes without them, and 27 to 36 with them.
    return keys >> (16 if x.dtype == tl.bfloat16 else (13 if x.dtype == tl.float16 else 0))


@cached_launch
@triton.jit(do_not_specialize=["F"])
def _group_max_kernel(
    maxima_ptr,  # [R, maxima_stride], keys
    x_ptr,  # [R, F]
    F,
    maxima_stride,  # a multiple of BLOCK_G
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # Groups are aligned in memory whatever F is: the first and the last of a row may be smaller.
    tiles = maxima_stride // BLOCK_G
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row_start, row_end = row * F, (row + 1) * F
    start = (row_start // GROUP + tile * BLOCK_G) * GROUP
    groups = tl.arange(0, BLOCK_G)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    if (start >= row_start) & (start + BLOCK_G * GROUP <= row_end):
        maxima = tl.max(_keys(tl.load(x_ptr + start + offsets), dtype), axis=1)
    else:
        in_row = (start + offsets >= row_start) & (start + offsets < row_end)
        x = tl.load(x_ptr + start + offsets, mask=in_row, other=0.0)
        maxima = tl.max(tl.where(in_row, _keys(x, dtype), _lowest(dtype)), axis=1)
    tl.store(maxima_ptr + row * maxima_stride + tile * BLOCK_G + groups, maxima)


@triton.jit
def _count_from(keys_ptr, n, threshold, BLOCK: tl.constexpr):
    """How many of n keys reach the threshold, which is above the lowest."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + i, mask=i < n, other=_lowest(keys_ptr.dtype.element_ty))
        count += (key >= threshold).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _choose(
    chosen_ptr,  # [k], the places of the chosen keys, ascending
    keys_ptr,  # [n]
    n,
    k,
    low,
    high,
    BLOCK: tl.constexpr,
):
    """Choose the k largest of n keys, of equal ones the first, where at least k reach ``low`` and none is above
    ``high``. Returns ``low`` as far as it was raised."""
    above = 0  # how many keys are above high
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        count = _count_from(keys_ptr, n, middle, BLOCK)
        above = tl.where(count < k, count, above)
        low = tl.where(count < k, low, middle)
        high = tl.where(count < k, middle - 1, tl.where(count == k, middle, high))
    room = k - above  # for keys that equal low: no fewer than there are if exactly k reach it
    above, equal = 0, 0  # keys so far
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + i, mask=i < n, other=_lowest(keys_ptr.dtype.element_ty))
        is_above, is_equal = key > low, (key == low) & (i < n)
        # Both counts in one scan: 16 bits hold a block.
        counts = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        before = tl.cumsum(counts, axis=0) - counts
        above_before, equal_before = above + (before & 0xFFFF), equal + (before >> 16)
        mask = is_above | (is_equal & (equal_before < room))
        tl.store(chosen_ptr + above_before + tl.minimum(equal_before, room), i, mask=mask)
        total = tl.sum(counts)
        above += total & 0xFFFF
        equal += total >> 16
    tl.debug_barrier()  # the program reads what it has stored
    return low


@cached_launch
@triton.jit(do_not_specialize=["F", "k"])
def _select_kernel(
    vals_ptr,  # [R, k]
    indices_ptr,  # [R, k]
    groups_ptr,  # [R, k], for the chosen groups
    candidates_ptr,  # [R, k * GROUP], for the keys of their elements
    places_ptr,  # [R, k], for the chosen places in candidates
    maxima_ptr,  # [R, maxima_stride]
    x_ptr,  # [R, F]
    F,
    k,
    maxima_stride,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start, row_end = row * F, (row + 1) * F
    first_group = row_start // GROUP
    all_groups = (tl.cdiv(row_end, GROUP) - first_group).to(tl.int32)
    maxima_ptr += row * maxima_stride
    groups_ptr += row * k
    candidates_ptr += row * k * GROUP
    places_ptr += row * k
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty

    n = tl.cdiv(all_groups, 16) * 16  # a multiple of 16, or loads are split
    high = tl.zeros([BLOCK], dtype) + _lowest(dtype)
    low = -(high + 1)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(maxima_ptr + i, mask=i < n, other=_lowest(dtype))
        low, high = tl.where(i < all_groups, tl.minimum(low, key), low), tl.maximum(high, key)
    low, high = tl.min(low), tl.max(high)
    groups = tl.minimum(k, all_groups)
    low = _choose(groups_ptr, maxima_ptr, n, groups, low, high, BLOCK)

    for start in range(0, groups * GROUP, BLOCK):
        i = start + tl.arange(0, BLOCK)
        exists = i < groups * GROUP
        element = (first_group + tl.load(groups_ptr + i // GROUP, mask=exists, other=0)) * GROUP + i % GROUP
        in_row = exists & (element >= row_start) & (element < row_end)
        key = _keys(tl.load(x_ptr + element, mask=in_row, other=0.0), dtype)
        tl.store(candidates_ptr + i, tl.where(in_row, key, _lowest(dtype)), mask=exists)
    tl.debug_barrier()
    # The maxima of k groups reach low, and so do k elements.
    low = tl.where(groups == k, low, _lowest(dtype))
    _choose(places_ptr, candidates_ptr, groups * GROUP, k, low, high, BLOCK)

    # The rank of a chosen element is how many come before it.
    for start_i in range(0, k, BLOCK_I):
        i = start_i + tl.arange(0, BLOCK_I)
        place = tl.load(places_ptr + i, mask=i < k, other=0)
        key = tl.load(candidates_ptr + place)
        rank = tl.zeros([BLOCK_I], tl.int32)
        for start_j in range(0, k, BLOCK_J):
            j = start_j + tl.arange(0, BLOCK_J)
            other = tl.load(candidates_ptr + tl.load(places_ptr + j, mask=j < k, other=0))
            ahead = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
            rank += tl.sum((ahead & (j < k)[None, :]).to(tl.int32), axis=1)
        element = (first_group + tl.load(groups_ptr + place // GROUP)) * GROUP + place % GROUP
        val = tl.load(x_ptr + element, mask=i < k, other=0.0)
        if RELU:
            val = tl.where(key <= 0, 0.0, val)
        tl.store(vals_ptr + row * k + rank, val, mask=i < k)
        tl.store(indices_ptr + row * k + rank, element - row_start, mask=i < k)


def _groups(F):
    """The most groups in a row, in whole blocks."""
    return cdiv(cdiv(F, _GROUP) + 1, _BLOCK_G) * _BLOCK_G


def selection_bytes(F: int, k: int, dtype: torch.dtype) -> int:
    """The memory of a row and of its selection."""
    if k > _MAX_K:  # what torch takes, about
        sorted_elements = F if F <= _MAX_SORTED else k
        return 2 * F * dtype.itemsize + 4 * sorted_elements * (dtype.itemsize + 8)
    keys = 8 if dtype == torch.float64 else 4
    return F * dtype.itemsize + (_groups(F) + k * _GROUP) * keys + 8 * k


def select_largest(
    x: torch.Tensor,  # [R, F], contiguous
    vals: torch.Tensor,  # [R, k], contiguous, of the dtype of x
    indices: torch.Tensor,  # [R, k] int64, contiguous
    relu: bool,
) -> None:
    """Write the k largest elements of each row to ``vals``, negative ones as zero if ``relu``, and where they are to
    ``indices``."""
    (R, F), k = x.shape, vals.shape[1]
    if k > _MAX_K:
        _select_by_sorting(x, vals, indices, relu)
        return
    keys = torch.int64 if x.dtype == torch.float64 else torch.int32
    groups = _groups(F)
    maxima = x.new_empty(R, groups, dtype=keys)
    _group_max_kernel[(R * (groups // _BLOCK_G),)](maxima, x, F, groups, GROUP=_GROUP, BLOCK_G=_BLOCK_G)
    _select_kernel[(R,)](
        vals,
        indices,
        x.new_empty(R, k, dtype=torch.int32),
        x.new_empty(R, k * _GROUP, dtype=keys),
        x.new_empty(R, k, dtype=torch.int32),
        maxima,
        x,
        F,
        k,
        groups,
        RELU=relu,
        GROUP=_GROUP,
        BLOCK=_BLOCK_BYTES // keys.itemsize,
        BLOCK_I=_RANK_BYTES // keys.itemsize,
        BLOCK_J=_RANK_BLOCK_J,
    )


def _select_by_sorting(x, vals, indices, relu):
    k = vals.shape[1]
    if x.is_cuda and x.shape[1] > _MAX_SORTED:
        # Of equal elements torch.topk takes the first ones on CUDA, in order unless it sorts them. -0.0 is not equal to
        # 0.0 there, but adding 0 makes it so. (In float32 only underflow gives -0.0.)
        largest = torch.topk(x + 0 if x.dtype.itemsize == 2 else x, k, dim=1, sorted=False)
        order = _sort(largest.values)
        torch.gather(largest.indices, 1, order.indices, out=indices)
    else:
        order = _sort(x)
        indices.copy_(order.indices[:, :k])
    vals.copy_(order.values[:, :k])
    if relu:
        vals.relu_()


def _sort(x):
    # On CUDA torch.sort may take a NaN with a sign for the smallest number.
    return x.nan_to_num(math.nan, math.inf, -math.inf).sort(dim=1, descending=True, stable=True)

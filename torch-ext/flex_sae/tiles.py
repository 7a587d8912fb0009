"""Tile shapes, and loading a sample's pairs and rows."""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def sample_tile(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sample of a program, its tile, the columns of this tile, and which of them exist.

    Sample fastest: all samples walk the same columns of weight while they sit in the L2 cache."""
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (cols < D) | (D % BLOCK_D == 0)
    return b, tile, cols, in_row


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
    """Features, vals and validity of some steps of sample b. An invalid index becomes feature 0 with a val of NaN: the
    sample's residual and the loss are then NaN.

    So every row can be loaded, and full tiles load without masks: predicates were up to a third of the loop."""
    exists = (steps >= 0) & (steps < K)
    feature = tl.load(indices_ptr + b * K + steps, mask=exists, other=0).to(tl.int64)
    val = tl.load(vals_ptr + b * K + steps, mask=exists, other=0.0).to(dtype)
    valid = (feature >= 0) & (feature < F)
    return tl.where(valid, feature, 0), tl.where(valid, val, float("nan")), valid & exists


@triton.jit
def load_offsets(offsets_ptr, b, P):
    """Where the pairs of sample b start and end, inside of [0, P] whatever the offsets are."""
    start, end = tl.load(offsets_ptr + b).to(tl.int64), tl.load(offsets_ptr + b + 1).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), P)
    return start, tl.maximum(tl.minimum(end, P), start)


@triton.jit
def add_rows(
    total,  # [BLOCK_D]
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    b,
    cols,  # [BLOCK_D]
    in_row,  # [BLOCK_D]
    weight_stride,
    K,
    F,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + sum_i vals[b, i] weight[indices[b, i]], some columns of it. EVEN_K: K is a multiple of BLOCK_K."""
    dtype: tl.constexpr = total.dtype
    steps = tl.arange(0, BLOCK_K)
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
        # Prefetch the next pairs.
        steps += BLOCK_K
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
        total += tl.sum(val[:, None] * weight.to(dtype), axis=0)
        feature, val, valid = next_feature, next_val, next_valid
    return total


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv takes 1.5 us of host time.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def gather_columns(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """Columns of a tile that gathers rows of weight: 256 bytes, or 32 columns where float64 doubles the registers.

    All samples walk the same columns of weight (grid: sample fastest), which must stay in the L2 cache: on an H200 at
    F=65536 a gather runs at 9.0 TB/s with 64 columns of float32, at 8.0 with 128 and at 5.9 with 256. Narrower tiles
    spend their instructions on indices.
    """
    columns = 32 if dtype == torch.float64 else 256 // weight.element_size()
    return min(columns, next_power_of_2(weight.shape[1]))


def row_alignment(weight: torch.Tensor, columns_per_lane: int) -> int:
    """What a kernel is told that the rows of weight are aligned to, so that a lane reads ``columns_per_lane`` of them.

    With a 32nd of a tile's columns per lane, all steps of a column lie in one lane, and sums and scans over steps need
    no shuffles. The stride of weight is not specialised: this is all that the compiler knows about it.
    """
    return math.gcd(weight.shape[1], weight.stride(0), max(1, columns_per_lane))


def unit_stride_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its rows can be read in place, else a contiguous copy."""
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    # The stride of a single row has no meaning, but an odd one would compile a kernel that no other batch needs.
    rows, columns = tensor.shape
    return tensor if rows > 1 or tensor.stride(0) >= columns else tensor.as_strided(tensor.shape, (columns, 1))

"""Sums over the samples of a batch, column by column: the gradient of bias."""

import torch
import triton
import triton.language as tl

from .checks import cdiv, next_power_of_2

# Rows of a program, so that a batch of 4096 takes one launch, and rows and columns that it reads at a time, with 16
# warps. Of eight such tiles on an H200 the fastest (B=4096, D=2304: 7 us, torch.sum 20).
_ROWS, _BLOCK_B, _BLOCK_D, _WARPS = 4096, 512, 16, 16


@triton.jit(do_not_specialize=["B"])
def _sum_columns_kernel(
    out_ptr,  # [cdiv(B, ROWS), D]
    rows_ptr,  # [B, width]
    scale_ptr,  # 0-dim, or None for 1
    B,
    D,
    width,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1).to(tl.int64)
    in_row = cols < D
    start = part * ROWS
    total = tl.zeros([BLOCK_B, BLOCK_D], rows_ptr.dtype.element_ty)
    for first in range(start, tl.minimum(start + ROWS, B), BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        mask = (b < B)[:, None] & in_row[None, :]
        total += tl.load(rows_ptr + (b * width)[:, None] + cols[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, axis=0)
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr)
    tl.store(out_ptr + part * D + cols, sums, mask=in_row)


def sum_columns(
    rows: torch.Tensor,  # [B, width], contiguous
    scale: torch.Tensor,  # 0-dim
    out: torch.Tensor,  # [D], D <= width
) -> None:
    """Write ``out = scale * rows[:, :D].sum(0)``, in a fixed order."""
    D = out.shape[0]
    block_d = min(_BLOCK_D, next_power_of_2(D))
    while True:
        (B, width), parts = rows.shape, cdiv(rows.shape[0], _ROWS)
        is_last = parts == 1
        sums = out if is_last else rows.new_empty(parts, D)
        _sum_columns_kernel[(cdiv(D, block_d), parts)](
            sums,
            rows,
            scale if is_last else None,
            B,
            D,
            width,
            ROWS=_ROWS,
            BLOCK_B=_BLOCK_B,
            BLOCK_D=block_d,
            num_warps=_WARPS,
        )
        if is_last:
            return
        rows = sums

"""The gradient of bias of the hierarchical loss: sums over the samples of a batch, column by column, times c."""

import torch
import triton
import triton.language as tl

from .checks import cdiv, next_power_of_2
from .launch import quick_launch, wait_for_memory

# Rows of a program, and rows and columns that its 16 warps read at a time. Of eight such tiles on an H200 the fastest
# (B=4096, D=2304, rows in the L2 cache: 7 us, torch.sum 20). At B=8192 one program for all rows takes 22 us, two and
# their sum 30.
_ROWS, _BLOCK_B, _BLOCK_D, _WARPS = 8192, 512, 16, 16


@quick_launch
@triton.jit(do_not_specialize=["B", "K"], do_not_specialize_on_alignment=["grad_out_ptr"])
def _sum_columns_kernel(
    out_ptr,  # [cdiv(B, ROWS), D]
    scale_ptr,  # 0-dim, c
    rows_ptr,  # [B, D]
    grad_out_ptr,  # 0-dim
    B,
    K,
    D,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    tiles = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    in_row = cols < D
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    # Before the loop: a branch after it makes ptxas load a thread's rows one by one, which takes up to twice the time.
    scale = tl.load(grad_out_ptr) * (2.0 / (tl.full([], 1.0, dtype) * B * K * D))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype)
    for start in range(part * ROWS, tl.minimum((part + 1) * ROWS, B), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        mask = (b < B)[:, None] & in_row[None, :]
        total += tl.load(rows_ptr + (b * D)[:, None] + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + part * D + cols, tl.sum(total, axis=0) * scale, mask=in_row)


def sum_columns(
    rows: torch.Tensor,  # [B, D], contiguous
    grad_out: torch.Tensor,  # 0-dim
    K: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``c * rows.sum(0)``, summed in a fixed order, and ``c = grad_out * 2 / (B * K * D)``, in the dtype of rows."""
    B, D = rows.shape
    parts, block_d = cdiv(B, _ROWS), min(_BLOCK_D, next_power_of_2(D))
    sums, scale = rows.new_empty((D,) if parts == 1 else (parts, D)), rows.new_empty(())
    _sum_columns_kernel[(parts * cdiv(D, block_d),)](
        sums, scale, rows, grad_out, B, K, D, ROWS=_ROWS, BLOCK_B=_BLOCK_B, BLOCK_D=block_d, num_warps=_WARPS
    )
    return sums if parts == 1 else sums.sum(0), scale

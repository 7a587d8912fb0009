"""The decode of sparse codes: sums of rows of a dictionary, weighted by a sample's vals.

recon_b = sum over pairs p of sample b of vals[p] * weight[indices[p]]
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from .dispatch import compute_dtype
from .launch import cached_launch
from .tiles import (
    add_rows,
    cdiv,
    gather_columns,
    load_offsets,
    next_power_of_2,
    row_alignment,
    sample_tile,
    unit_stride_rows,
)

# Steps of a tile, as in the TopK forward pass
_BLOCK_K = 32


@cached_launch
@triton.jit(do_not_specialize=["F", "P", "weight_stride"])
def _decode_kernel(
    recon_ptr,  # [B, D]
    indices_ptr,  # [P], the pairs of sample b from b * K or offsets[b] on
    weight_ptr,  # [F, D]
    vals_ptr,  # [P]
    offsets_ptr,  # [B + 1], or None
    weight_stride,
    K,
    F,
    P,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, _, cols, in_row = sample_tile(D, BLOCK_D)
    recon = tl.zeros([BLOCK_D], recon_ptr.dtype.element_ty)
    row = b
    if offsets_ptr is not None:
        start, K = load_offsets(offsets_ptr, b, P)
        indices_ptr += start
        vals_ptr += start
        row = 0
    recon = add_rows(
        recon, indices_ptr, weight_ptr, vals_ptr, row, cols, in_row, weight_stride, K, F, EVEN_K, ALIGN, BLOCK_K
    )
    tl.store(recon_ptr + b * D + cols, recon, mask=in_row)


def decode(
    indices: torch.Tensor,  # [B, K], or [P]; contiguous
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # as indices; contiguous
    B: int,
    offsets: Optional[torch.Tensor] = None,  # [B + 1]
) -> torch.Tensor:
    """recon [B, D], in the dtype of its sums."""
    F, D = weight.shape
    K = indices.shape[-1]
    weight = unit_stride_rows(weight)
    dtype = compute_dtype(weight, vals)
    block_k = min(_BLOCK_K, next_power_of_2(K)) if offsets is None else _BLOCK_K
    block_d = gather_columns(weight, dtype)
    recon = weight.new_empty(B, D, dtype=dtype)
    _decode_kernel[(B, cdiv(D, block_d))](
        recon,
        indices,
        weight,
        vals,
        offsets,
        weight.stride(0),
        K if offsets is None else 0,
        F,
        indices.numel(),
        D=D,
        EVEN_K=offsets is None and K % block_k == 0,
        ALIGN=row_alignment(weight, block_d // 32),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=1,
    )
    return recon

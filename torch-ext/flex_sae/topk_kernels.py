"""TopK: the decoder loss of a TopK sparse autoencoder, forward and backward.

With w_i = weight[indices[b, i]] and v_i = vals[b, i] of one sample b,

    r_b = bias + sum_i v_i w_i - target_b,    loss = sum_b s_b |r_b|^2 / (B D),

where s_b is the weight of the sample, and with g_b = 2 s_b r_b / (B D), the gradient of the reconstruction,
the gradients are

    d weight[f] = grad_out sum over pairs (b, i) with indices[b, i] = f of v_i g_b,    d v_i = grad_out <w_i, g_b>,
    d bias = grad_out sum_b g_b,    d target_b = -grad_out g_b.

The forward pass keeps g. d weight is a sum over the pairs of each feature (segment_sum.py), in which the dot products
of d v are taken on the way.
"""

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import check_inputs
from .column_sum import sum_columns
from .dispatch import (
    compute_dtype,
    device_of,
    needs_gradients,
    promoted_dtype,
    refuse_second_derivative,
    runs_triton,
)
from .launch import cached_launch
from .ordering import order_pairs
from .reference import unchecked_topk_sae_loss
from .segment_sum import SegmentSum
from .tiles import add_rows, cdiv, gather_columns, next_power_of_2, row_alignment, sample_tile, unit_stride_rows

# Steps of a forward tile. On an H200 (B=4096, F=65536, D=2304, K=128) it takes 0.55 ms in float32 and 0.30 in bfloat16
# with 32, 0.62 and 0.40 with 16.
_FORWARD_BLOCK_K = 32


@cached_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride"])
def _topk_forward_kernel(
    loss_ptr,  # [cdiv(D, BLOCK_D), B], this tile's share of the loss
    recon_grad_ptr,  # [B, D], g, or None
    recon_ptr,  # [B, D], or None
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D]
    target_ptr,  # [B, D]
    sample_weight_ptr,  # [B], or None for weights of 1
    weight_stride,
    target_stride,
    B,
    K,
    F,
    D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, tile, cols, in_row = sample_tile(D, BLOCK_D)
    dtype: tl.constexpr = loss_ptr.dtype.element_ty

    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    recon = add_rows(
        bias, indices_ptr, weight_ptr, vals_ptr, b, cols, in_row, weight_stride, K, F, EVEN_K, ALIGN, BLOCK_K
    )
    if recon_ptr is not None:
        tl.store(recon_ptr + b * D + cols, recon, mask=in_row)
    residual = tl.where(in_row, recon - target, 0.0)  # inf * 0 past the last column is NaN
    weighted = residual
    if sample_weight_ptr is not None:
        weighted *= tl.load(sample_weight_ptr + b).to(dtype)
    if recon_grad_ptr is not None:
        recon_grad = weighted * (tl.full([], 2.0, dtype) / B / D)
        tl.store(recon_grad_ptr + b * D + cols, recon_grad, mask=in_row)
    tl.store(loss_ptr + tile.to(tl.int64) * B + b, tl.sum(weighted * residual) / B / D)


def _topk_forward(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    sample_weight: Optional[torch.Tensor],  # [B]
    needs_grad: bool,
    return_recon: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, recon [B, D] and g [B, D]; an empty tensor for what is not needed."""
    (B, K), (F, D) = indices.shape, weight.shape
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    weight, target = unit_stride_rows(weight), unit_stride_rows(target)
    block_k, block_d = min(_FORWARD_BLOCK_K, next_power_of_2(K)), gather_columns(weight, dtype)
    tiles = cdiv(D, block_d)
    shares = weight.new_empty(tiles, B, dtype=dtype)
    recon_grad = weight.new_empty((B, D) if needs_grad else 0, dtype=dtype)
    recon = weight.new_empty((B, D) if return_recon else 0, dtype=promoted_dtype(weight, vals, bias))
    with device_of(weight):
        _topk_forward_kernel[(B, tiles)](
            shares,
            recon_grad if needs_grad else None,
            recon if return_recon else None,
            indices.contiguous(),
            weight,
            vals.contiguous(),
            bias.contiguous(),
            target,
            None if sample_weight is None else sample_weight.contiguous(),
            weight.stride(0),
            target.stride(0),
            B,
            K,
            F,
            D=D,
            EVEN_K=K % block_k == 0,
            ALIGN=row_alignment(weight, block_d // 32),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
    return shares.sum(), recon, recon_grad


def _topk_backward(
    grad_out: torch.Tensor,  # 0-dim
    recon_grad: torch.Tensor,  # [B, D], g
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias_dtype: torch.dtype,
    target_dtype: torch.dtype,
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
    needs_target: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight, vals, bias and target, an empty tensor for one that is not needed."""
    F, D = weight.shape
    # What comes out of saved_tensors may have any strides.
    recon_grad, indices, vals = recon_grad.contiguous(), indices.contiguous(), vals.contiguous()
    weight_grad = weight.new_empty((F, D) if needs_weight else 0)
    vals_grad = vals.new_empty(vals.shape if needs_vals else 0)
    bias_grad = weight.new_empty(0, dtype=bias_dtype)
    target_grad = weight.new_empty(0, dtype=target_dtype)
    with device_of(weight):
        if needs_bias:
            bias_grad = sum_columns(recon_grad, grad_out).to(bias_dtype)
        if needs_weight or needs_vals:
            pairs = order_pairs(indices, vals, F, recon_grad.dtype)
            sums = SegmentSum(
                pairs, grad_out, D, weight_grad if needs_weight else None, vals_grad if needs_vals else None, weight
            )
            sums.add(recon_grad)
            sums.finish()
        if needs_target:
            target_grad = (recon_grad * -grad_out).to(target_dtype)
    return weight_grad, vals_grad, bias_grad, target_grad


torch.library.define(
    add_op_namespace_prefix("topk_forward"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor bias, Tensor target, Tensor? sample_weight, bool needs_grad,"
    " bool return_recon) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("topk_forward"), "default", _topk_forward)

torch.library.define(
    add_op_namespace_prefix("topk_backward"),
    "(Tensor grad_out, Tensor recon_grad, Tensor indices, Tensor weight, Tensor vals, ScalarType bias_dtype,"
    " ScalarType target_dtype, bool needs_weight, bool needs_vals, bool needs_bias, bool needs_target)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("topk_backward"), "default", _topk_backward)


@torch.library.register_fake(add_op_namespace_prefix("topk_forward"))
def _topk_forward_fake(indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon):
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    return (
        weight.new_empty((), dtype=dtype),
        weight.new_empty(target.shape if return_recon else 0, dtype=promoted_dtype(weight, vals, bias)),
        weight.new_empty(target.shape if needs_grad else 0, dtype=dtype),
    )


@torch.library.register_fake(add_op_namespace_prefix("topk_backward"))
def _topk_backward_fake(grad_out, recon_grad, indices, weight, vals, bias_dtype, target_dtype, *needs):
    needs_weight, needs_vals, needs_bias, needs_target = needs
    return (
        weight.new_empty(weight.shape if needs_weight else 0),
        vals.new_empty(vals.shape if needs_vals else 0),
        weight.new_empty(weight.shape[1] if needs_bias else 0, dtype=bias_dtype),
        weight.new_empty(recon_grad.shape if needs_target else 0, dtype=target_dtype),
    )


class TopKSAELoss(torch.autograd.Function):
    """The two ops above as one differentiable function, see `triton_topk_sae_loss`.

    The ops go through torch's dispatcher, a tenth of a small step, so that lazily negated tensors are resolved, and
    modes, tracers and profilers see them.
    """

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon):
        loss, recon, recon_grad = ops.topk_forward(
            indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon
        )
        ctx.save_for_backward(recon_grad, indices, weight, vals)
        ctx.dtypes = bias.dtype, target.dtype
        ctx.mark_non_differentiable(recon)
        ctx.set_materialize_grads(False)  # none is made for recon
        return loss, recon

    @staticmethod
    def backward(ctx, grad_out, _):
        refuse_second_derivative("triton_topk_sae_loss")
        if grad_out is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[1:5]
        grads = ops.topk_backward(grad_out, *ctx.saved_tensors, *ctx.dtypes, *needs)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs)), None, None, None


def triton_topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    sample_weight: Optional[torch.Tensor] = None,
    return_recon: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Mean squared error of a TopK sparse autoencoder's reconstruction, fused with the sparse decode.

    ``loss = mean over b, d of s_b * (bias + sum_i vals[b, i] * weight[indices[b, i]] - target[b])[d] ** 2``. The order
    of a sample's features does not matter; features that repeat add up. (TopK autoencoders: Gao et al., arXiv
    2406.04093, section 2.3.)

    Args:
        indices: ``[B, K]`` int32 or int64, the active features of each sample, in ``[0, F)``. One out of range is not
            followed and makes the loss NaN, and with it the gradients of its sample's vals and target, of the rows of
            weight that its sample chose (it may count as any other) and of bias.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: ``[B, K]``, the activations.
        bias: ``[D]``.
        target: ``[B, D]``, what to reconstruct.
        sample_weight: ``[B]``, the factor s_b of each sample in the sum, for example a mask of tokens; None for 1. It
            gets no gradient. The mean divides by B whatever the weights are.
        return_recon: whether to return the reconstruction too.

    All but indices are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64 if any of
    them is, and are rounded once, where they are stored.

    Returns:
        0-dim float32 (float64 if any input is) tensor, differentiable once in weight, vals, bias and target. With
        ``return_recon=True`` the loss and recon ``[B, D]``, ``bias + sum_i vals[b, i] * weight[indices[b, i]]`` in the
        promoted dtype of weight, vals and bias, without a gradient. The same inputs give the same bits. Tensors on a
        CPU go to `topk_sae_loss`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, sample_weight requires a gradient, or sizes are too large for
            a launch: B * K, B * ceil(D / 32) or F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
        IndexError: an index is out of range and ``FLEX_SAE_CHECK_INDICES=1`` is in the environment, which costs a
            device synchronisation.
    """
    check_inputs(indices, weight, vals, bias, target, sample_weight)
    if not runs_triton(indices):
        return unchecked_topk_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon)
    needs_grad = needs_gradients(weight, vals, bias, target)
    with torch.set_grad_enabled(needs_grad):
        loss, recon = TopKSAELoss.apply(indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon)
    return (loss, recon) if return_recon else loss

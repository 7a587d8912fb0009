"""HierarchicalTopK: the decoder loss of every prefix of a sample's features at once, forward and backward.

With w_i = weight[indices[b, i]] and v_i = vals[b, i] of one sample b, the prefix residuals and their suffix sums are

    r_j = bias - target_b + sum_{i <= j} v_i w_i,    S_i = sum_{j >= i} r_j,    i, j = 0..K-1,

    loss = sum_{b, j} s_b |r_j|^2 / (B K D),

where s_b is the weight of the sample, and with c_b = grad_out * 2 s_b / (B K D) the gradients are

    d weight[f] = sum over pairs (b, i) with indices[b, i] = f of c_b v_i S_i,    d v_i = c_b <w_i, S_i>,
    d bias = sum_b c_b S_0,    d target_b = -c_b S_0.

The forward pass keeps s_b S_0 and the last residual. The backward pass starts from the last residual and walks the
steps in reverse (hierarchical_backward.py).
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
from .hierarchical_backward import atomic_gradients, narrow_scratch, ordered_gradients, row_scales_of
from .launch import cached_launch
from .reference import unchecked_hierarchical_sae_loss
from .replicas import count_pairs
from .tiles import cdiv, gather_columns, load_pairs, next_power_of_2, row_alignment, sample_tile, unit_stride_rows

# Steps of a forward tile. Of 4 to 32 on an H200 (B=4096, F=65536, D=2304) the best at K=128, by 9% in float32 and by
# 30% in bfloat16.
_FORWARD_BLOCK_K = 32


@cached_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride"])
def _hierarchical_forward_kernel(
    loss_ptr,  # [cdiv(D, BLOCK_D), B], this tile's share of the loss, without the sample's weight
    suffix_ptr,  # [B, D], s_b S_0, or None
    residual_ptr,  # [B, D], r_{K-1}, or None
    recon_ptr,  # [B, D], or None
    counts_ptr,  # [F], zeros, or None
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

    if counts_ptr is not None and tile == 0:
        count_pairs(counts_ptr, indices_ptr, b, K, F, BLOCK_K)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    recon, residual = bias, bias - target
    suffix = tl.zeros([BLOCK_D], dtype)
    squares = tl.zeros([BLOCK_D], dtype)
    steps = tl.arange(0, BLOCK_K)
    first, last = (steps == 0)[:, None], (steps == BLOCK_K - 1)[:, None]
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
        # Prefetch the next pairs.
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps + BLOCK_K, K, F, dtype)

        added = val[:, None] * weight.to(dtype)
        if recon_ptr is not None:
            recon += tl.sum(added, axis=0)
        residuals = tl.cumsum(tl.where(first, residual[None, :] + added, added), axis=0)
        residual = tl.sum(tl.where(last, residuals, 0.0), axis=0)
        if not EVEN_K:
            residuals = tl.where((steps < K)[:, None], residuals, 0.0)
        suffix += tl.sum(residuals, axis=0)
        squares += tl.sum(residuals * residuals, axis=0)

        steps += BLOCK_K
        feature, val, valid = next_feature, next_val, next_valid

    if recon_ptr is not None:
        tl.store(recon_ptr + b * D + cols, recon, mask=in_row)
    if suffix_ptr is not None:
        if sample_weight_ptr is not None:
            suffix *= tl.load(sample_weight_ptr + b).to(dtype)
        tl.store(suffix_ptr + b * D + cols, suffix, mask=in_row)
        tl.store(residual_ptr + b * D + cols, residual, mask=in_row)
    squares = tl.where(in_row, squares, 0.0)  # inf * 0 past the last column is NaN
    tl.store(loss_ptr + tile.to(tl.int64) * B + b, tl.sum(squares) / (tl.full([], 1.0, dtype) * B * K * D))


def _hierarchical_forward(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    sample_weight: Optional[torch.Tensor],  # [B]
    needs_grad: bool,
    needs_weight: bool,
    return_recon: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, recon [B, D], s_b S_0 [B, D], r_{K-1} [B, D], the number of each feature's pairs [F] where d weight may
    be summed atomically, and the scales of scratch [B] where it is float16; an empty tensor for what is not needed."""
    (B, K), (F, D) = indices.shape, weight.shape
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    weight, target = unit_stride_rows(weight), unit_stride_rows(target)
    block_k, block_d = min(_FORWARD_BLOCK_K, next_power_of_2(K)), gather_columns(weight, dtype)
    tiles = cdiv(D, block_d)
    shares = weight.new_empty(tiles, B, dtype=dtype)
    suffix, residual = (weight.new_empty((B, D) if needs_grad else 0, dtype=dtype) for _ in range(2))
    recon = weight.new_empty((B, D) if return_recon else 0, dtype=promoted_dtype(weight, vals, bias))
    # In deterministic mode too: a checkpoint that recomputes in another mode has to save the same tensors.
    counts = indices.new_zeros(F if needs_weight and weight.dtype == dtype else 0, dtype=torch.int32)
    with device_of(weight):
        _hierarchical_forward_kernel[(B, tiles)](
            shares,
            suffix if needs_grad else None,
            residual if needs_grad else None,
            recon if return_recon else None,
            counts if counts.numel() else None,
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
        has_scales = needs_grad and narrow_scratch(weight, dtype)
        row_scales = row_scales_of(shares, K, D) if has_scales else shares.new_empty(0)
        if sample_weight is not None:
            shares = shares * sample_weight
    return shares.sum(), recon, suffix, residual, counts, row_scales


def _hierarchical_backward(
    grad_out: torch.Tensor,  # 0-dim
    suffix: torch.Tensor,  # [B, D], s_b S_0
    residual: torch.Tensor,  # [B, D], r_{K-1}
    counts: torch.Tensor,  # [F], or empty
    row_scales: torch.Tensor,  # [B], or empty
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    sample_weight: Optional[torch.Tensor],  # [B]
    bias_dtype: torch.dtype,
    target_dtype: torch.dtype,
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
    needs_target: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight, vals, bias and target, an empty tensor for one that is not needed."""
    (B, D), K = suffix.shape, indices.shape[1]
    # What comes out of saved_tensors may have any strides.
    suffix, residual, indices, vals = (tensor.contiguous() for tensor in (suffix, residual, indices, vals))
    sample_weight = None if sample_weight is None else sample_weight.to(suffix.dtype).contiguous()
    weight_grad = vals_grad = None
    bias_grad = weight.new_empty(0, dtype=bias_dtype)
    target_grad = weight.new_empty(0, dtype=target_dtype)
    scale = grad_out * (2 / (B * K * D))
    with device_of(weight):
        if needs_bias:
            bias_grad = sum_columns(suffix, scale).to(bias_dtype)
        if needs_weight or needs_vals:
            weight = unit_stride_rows(weight)
            arguments = indices, weight, vals, sample_weight, needs_weight, needs_vals
            if torch.are_deterministic_algorithms_enabled() or weight.dtype != suffix.dtype:
                weight_grad, vals_grad = ordered_gradients(residual, scale, row_scales, *arguments)
            else:
                weight_grad, vals_grad = atomic_gradients(residual, scale, counts, *arguments)
        if needs_target:
            target_grad = (suffix * -scale).to(target_dtype)
    return (
        weight_grad if needs_weight else weight.new_empty(0),
        vals_grad.to(vals.dtype) if needs_vals else vals.new_empty(0),
        bias_grad,
        target_grad,
    )


torch.library.define(
    add_op_namespace_prefix("hierarchical_forward"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor bias, Tensor target, Tensor? sample_weight, bool needs_grad,"
    " bool needs_weight, bool return_recon) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("hierarchical_forward"), "default", _hierarchical_forward)

torch.library.define(
    add_op_namespace_prefix("hierarchical_backward"),
    "(Tensor grad_out, Tensor suffix, Tensor residual, Tensor counts, Tensor row_scales, Tensor indices, Tensor weight,"
    " Tensor vals, Tensor? sample_weight, ScalarType bias_dtype, ScalarType target_dtype, bool needs_weight,"
    " bool needs_vals, bool needs_bias, bool needs_target) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("hierarchical_backward"), "default", _hierarchical_backward)


@torch.library.register_fake(add_op_namespace_prefix("hierarchical_forward"))
def _hierarchical_forward_fake(
    indices, weight, vals, bias, target, sample_weight, needs_grad, needs_weight, return_recon
):
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    recon = weight.new_empty(target.shape if return_recon else 0, dtype=promoted_dtype(weight, vals, bias))
    suffix, residual = (weight.new_empty(target.shape if needs_grad else 0, dtype=dtype) for _ in range(2))
    counts = indices.new_empty(weight.shape[0] if needs_weight and weight.dtype == dtype else 0, dtype=torch.int32)
    row_scales = suffix.new_empty(target.shape[0] if needs_grad and narrow_scratch(weight, dtype) else 0)
    return suffix.new_empty(()), recon, suffix, residual, counts, row_scales


@torch.library.register_fake(add_op_namespace_prefix("hierarchical_backward"))
def _hierarchical_backward_fake(
    grad_out,
    suffix,
    residual,
    counts,
    row_scales,
    indices,
    weight,
    vals,
    sample_weight,
    bias_dtype,
    target_dtype,
    *needs,
):
    needs_weight, needs_vals, needs_bias, needs_target = needs
    return (
        weight.new_empty(weight.shape if needs_weight else 0),
        vals.new_empty(vals.shape if needs_vals else 0),
        weight.new_empty(weight.shape[1] if needs_bias else 0, dtype=bias_dtype),
        weight.new_empty(suffix.shape if needs_target else 0, dtype=target_dtype),
    )


class HierarchicalSAELoss(torch.autograd.Function):
    """The two ops above as one differentiable function, see `triton_hierarchical_sae_loss`."""

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon):
        needs_weight = needs_grad and ctx.needs_input_grad[1]
        loss, recon, *state = ops.hierarchical_forward(
            indices, weight, vals, bias, target, sample_weight, needs_grad, needs_weight, return_recon
        )
        ctx.save_for_backward(*state, indices, weight, vals, sample_weight)
        ctx.dtypes = bias.dtype, target.dtype
        ctx.mark_non_differentiable(recon)
        ctx.set_materialize_grads(False)  # none is made for recon
        return loss, recon

    @staticmethod
    def backward(ctx, grad_out, _):
        refuse_second_derivative("triton_hierarchical_sae_loss")
        if grad_out is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[1:5]
        grads = ops.hierarchical_backward(grad_out, *ctx.saved_tensors, *ctx.dtypes, *needs)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs)), None, None, None


def triton_hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    sample_weight: Optional[torch.Tensor] = None,
    return_recon: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Mean squared error of the reconstructions from the first 1, 2, .., K features of each sample, fused.

    ``loss = mean over b, j, d of s_b * (bias + sum_{i <= j} vals[b, i] * weight[indices[b, i]] - target[b])[d] ** 2``,
    the HierarchicalTopK objective of arXiv 2505.24473, section 3, over all budgets 1..K. The order of the columns
    matters: column 0 is the most important feature. Pass ``torch.topk(..., sorted=True)`` output.

    Args:
        indices: ``[B, K]`` int32 or int64, the active features of each sample, most important first, in ``[0, F)``.
            One out of range is not followed and makes the loss NaN, and with it the gradients of its sample's vals and
            target, of the rows of weight that its sample chose (it may count as any other) and of bias.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: ``[B, K]``, the activations.
        bias: ``[D]``.
        target: ``[B, D]``, what to reconstruct.
        sample_weight: ``[B]``, the factor s_b of each sample in the sum, for example a mask of tokens; None for 1. It
            gets no gradient. The mean divides by B whatever the weights are.
        return_recon: whether to return the reconstruction too.

    All but indices are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64 if any of
    them is, and are rounded once, where they are stored. Where weight is bfloat16 and sums are float32,
    the S_i in its gradient are rounded to 11 bits before, three more than the gradient keeps (fewer below 2e-9 of the
    largest that the sample can have). Where residuals are so large or small that their squares leave the range of
    float32, those S_i may overflow or be lost, and a NaN in some columns of a sample takes all of them.

    Returns:
        0-dim float32 (float64 if any input is) tensor, differentiable once in weight, vals, bias and target. With
        ``return_recon=True`` the loss and recon ``[B, D]``, the reconstruction from all K features in the promoted
        dtype of weight, vals and bias, without a gradient.

        Loss, recon and gradients of bias and target are the same bits every run. So are those of weight and vals where
        weight is narrower than the sums, and everywhere under ``torch.use_deterministic_algorithms(True)``, which takes
        up to twice the time. Either way the sum takes at most ``B * max(65536, 256 * K)`` bytes of scratch.
        Tensors on a CPU go to `hierarchical_sae_loss`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, sample_weight requires a gradient, or sizes are too large for
            a launch: B * K, B * ceil(D / 32) or F * ceil(D / 32) > 2**31 - 2**21, or D > 2**20.
        IndexError: an index is out of range and ``FLEX_SAE_CHECK_INDICES=1`` is in the environment, which costs a
            device synchronisation. It also warns of vals that do not descend along the columns.
    """
    check_inputs(indices, weight, vals, bias, target, sample_weight, ordered=True)
    if not runs_triton(indices):
        return unchecked_hierarchical_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon)
    needs_grad = needs_gradients(weight, vals, bias, target)
    with torch.set_grad_enabled(needs_grad):
        loss, recon = HierarchicalSAELoss.apply(
            indices, weight, vals, bias, target, sample_weight, needs_grad, return_recon
        )
    return (loss, recon) if return_recon else loss

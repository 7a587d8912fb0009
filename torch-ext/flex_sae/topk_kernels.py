"""TopK: the decoder loss of a TopK sparse autoencoder, forward and backward.

With w_i = weight[indices[b, i]] and v_i = vals[b, i] of one sample b,

    e_b = bias + sum_i v_i w_i - target_b,    loss = sum_b |e_b|^2 / (B D),

and with g_b = 2 e_b / (B D), the gradient of the reconstruction, the gradients are

    d weight[f] = grad_out sum over pairs (b, i) with indices[b, i] = f of v_i g_b,    d v_i = grad_out <w_i, g_b>,
    d bias = grad_out sum_b g_b,    d target_b = -grad_out g_b.

The forward pass keeps g. d weight is a sum over the pairs of a feature; on the way through them come the dot products
of d v, and d bias as the sum of one more feature, see pairs.py.

That sum gathers a row of g for every pair. Where all gradients are bfloat16, which keeps 8 bits, 11 bits of g are
enough: if pairs are many, it is kept in float16, in a unit for each sample.
"""

import torch
import triton
import triton.language as tl

from ._ops import add_op_namespace_prefix, ops
from .checks import (
    beside,
    cdiv,
    check_inputs,
    compute_dtype,
    device_of,
    lane_columns,
    mark,
    new_empty,
    next_power_of_2,
    no_grad_in_inference_mode,
    refuse_second_derivative,
    runs_triton,
    savable,
    select,
    tile_columns,
    unit_stride_rows,
)
from .launch import quick_launch, wait_for_memory
from .pairs import (
    SUM_BLOCK_D,
    OrderedPairs,
    finish,
    gather_pairs,
    load_pairs,
    new_pairs,
    new_pieces,
    new_sums,
    pairs_summer,
    sort_pairs,
)

# Steps of a forward tile. On an H200 (B=4096, F=65536, D=2304, K=128) it takes 0.55 ms in float32 and 0.30 in bfloat16
# with 32, 0.62 and 0.40 with 16.
_FORWARD_BLOCK_K = 32
# Steps from which on g is kept in float16, if it may be. A bfloat16 step with K=8, 32, 48, 64, 128 takes 0.35, 0.39,
# 0.47, 0.51, 0.78 ms there with float16, and 0.33, 0.39, 0.48, 0.55, 0.93 with float32.
_NARROW_K = 48
# Columns of g that a program, four warps, turns to float16 at a time. All take 13 us there, as with eight warps.
_NARROW_BLOCK_D = 4096


@quick_launch
@triton.jit(do_not_specialize=["B", "F", "weight_stride"])
def _topk_forward_kernel(
    loss_ptr,  # [cdiv(D, BLOCK_D), B], this tile's share of the loss
    recon_grad_ptr,  # [B, width], g and zeros
    indices_ptr,  # [B, K]
    weight_ptr,  # [F, D]
    vals_ptr,  # [B, K]
    bias_ptr,  # [D]
    target_ptr,  # [B, D]
    weight_stride,
    target_stride,
    B,
    K,
    F,
    D,
    width,
    NEEDS_GRAD: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    # Sample fastest: all samples walk the same columns of weight while they sit in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    D = D // ALIGN * ALIGN  # as it was, but now the compiler knows: it splits accesses whose mask may end anywhere
    in_row = (cols < D) | EVEN_D
    dtype: tl.constexpr = loss_ptr.dtype.element_ty

    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(dtype)
    target = tl.load(target_ptr + b * target_stride + cols, mask=in_row, other=0.0).to(dtype)
    residual = bias - target
    steps = tl.arange(0, BLOCK_K)
    feature, val, valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
    for _ in range(0, K, BLOCK_K):
        row = tl.multiple_of(feature * weight_stride, ALIGN)
        mask = (valid | EVEN_K)[:, None] & in_row[None, :]
        weight = tl.load(weight_ptr + row[:, None] + cols[None, :], mask=mask, other=0.0)
        # The next pairs are on their way before these rows are used.
        steps += BLOCK_K
        next_feature, next_val, next_valid = load_pairs(indices_ptr, vals_ptr, b, steps, K, F, dtype)
        residual += tl.sum(val[:, None] * weight.to(dtype), axis=0)
        feature, val, valid = next_feature, next_val, next_valid

    residual = tl.where(in_row, residual, 0.0)  # where an infinite val has made zeros NaN
    if NEEDS_GRAD:
        recon_grad = residual * (tl.full([], 2.0, dtype) / B / D)
        tl.store(recon_grad_ptr + b * width + cols, recon_grad, mask=cols < width)
    tl.store(loss_ptr + tile.to(tl.int64) * B + b, tl.sum(residual * residual) / B / D)


@quick_launch
@triton.jit
def _narrow_kernel(
    narrow_ptr,  # [B, width], float16
    units_ptr,  # [B]
    rows_ptr,  # [B, width]
    width,
    BLOCK_D: tl.constexpr,
):
    wait_for_memory()
    b = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        size = tl.abs(tl.load(rows_ptr + b * width + cols, mask=cols < width, other=0.0))
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    # The largest finite number becomes 2**15, but no unit is smaller than the smallest normal number.
    unit = tl.maximum(tl.max(largest, axis=0) * 2.0**-15, 2.0**-126)
    tl.store(units_ptr + b, unit)
    for start in range(0, width, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        row = tl.load(rows_ptr + b * width + cols, mask=cols < width, other=0.0)
        tl.store(narrow_ptr + b * width + cols, row / unit, mask=cols < width)


def _topk_forward(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    needs_grad: bool,
    needs_pairs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The loss, and what is needed of g [B, width] with the units of its rows [B] (else empty tensors, the latter also
    for units of 1) and of the OrderedPairs (else none). Columns of g from D on are zero."""
    (B, K), (F, D) = indices.shape, weight.shape
    dtype = compute_dtype(weight, vals, bias, target)
    weight, target = unit_stride_rows(weight), unit_stride_rows(target)
    indices, vals = indices.contiguous(), vals.contiguous()
    block_k, block_d = min(_FORWARD_BLOCK_K, next_power_of_2(K)), tile_columns(weight, dtype)
    tiles = cdiv(D, block_d)
    shares = torch.empty((tiles, B), dtype=dtype, device=weight.device)
    width = _row_width(weight, dtype)
    recon_grad = new_empty(weight, *((B, width) if needs_grad else (0,)), dtype=dtype)
    units = shares.new_empty(B if needs_pairs and _is_narrow(K, weight, vals, bias, target) else 0)
    pairs = new_pairs(indices, F, dtype, bias_pairs=B) if needs_pairs else ()
    with device_of(weight):
        before = mark(B * K * D, weight) if needs_pairs else None
        _topk_forward_kernel[(B, tiles)](
            shares,
            recon_grad,
            indices,
            weight,
            vals,
            bias.contiguous(),
            target,
            weight.stride(0),
            target.stride(0),
            B,
            K,
            F,
            D,
            width,
            NEEDS_GRAD=needs_grad,
            EVEN_K=K % block_k == 0,
            EVEN_D=D % block_d == 0,
            ALIGN=lane_columns(weight, block_d),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=1,
        )
        if needs_pairs:
            with beside(before):
                sort_pairs(pairs, indices)
                if not units.numel():
                    gather_pairs(pairs, indices, vals, units, want_slots=False)
        if units.numel():
            rows, recon_grad = recon_grad, new_empty(recon_grad, B, width, dtype=torch.float16)
            block_d = min(_NARROW_BLOCK_D, next_power_of_2(width))
            _narrow_kernel[(B,)](recon_grad, units, rows, width, BLOCK_D=block_d)
            gather_pairs(pairs, indices, vals, units, want_slots=False)
    return shares.sum(), recon_grad, units, list(pairs)


def _is_narrow(K, *tensors):
    """Whether g is kept in float16: where no gradient that comes of it keeps more than 8 bits, and it is read often."""
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors) and K >= _NARROW_K


def _row_width(weight, dtype):
    """D, rounded up to a multiple of 16, or to a power of two below that: the backward pass gathers rows of g 16 bytes
    at a time at any D."""
    return cdiv(weight.shape[1], 16) * 16 if tile_columns(weight, dtype) >= 16 else tile_columns(weight, dtype)


def _topk_backward(
    grad_out: torch.Tensor,  # 0-dim
    recon_grad: torch.Tensor,  # [B, width], g
    units: torch.Tensor,  # [B], of the rows of g, or empty
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias_dtype: torch.dtype,
    pairs: list[torch.Tensor],
    needs_weight: bool,
    needs_vals: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight [F, D], vals [B, K] and bias [D], an empty tensor for one that is not needed."""
    D = weight.shape[1]
    weight_grad = vals_grad = bias_grad = None
    with device_of(weight):
        if needs_bias:
            bias_grad = weight.new_empty(D, dtype=bias_dtype)
            if not needs_weight:
                rows = recon_grad * units[:, None] if units.numel() else recon_grad
                bias_grad.copy_(rows[:, :D].sum(0) * grad_out)
        if needs_weight or needs_vals:
            pairs = OrderedPairs(*pairs)
            pieces = dots = None
            if needs_weight:
                weight_grad, pieces = new_sums(pairs, weight), new_pieces(pairs, D)
            if needs_vals:
                vals_grad = vals.new_empty(vals.shape)
                weight = unit_stride_rows(weight)
                dots = new_empty(pairs.coefs, cdiv(D, SUM_BLOCK_D), pairs.coefs.numel())
            sum_bias = needs_bias and needs_weight
            pairs_summer(pairs, recon_grad, pairs.link, weight, grad_out, weight_grad, pieces, dots, sum_bias)(0)
            finish(pairs, grad_out, weight_grad, pieces, bias_grad if sum_bias else None, vals_grad, dots, units)
    return (
        weight_grad if needs_weight else weight.new_empty(0),
        vals_grad if needs_vals else vals.new_empty(0),
        bias_grad if needs_bias else weight.new_empty(0, dtype=bias_dtype),
    )


torch.library.define(
    add_op_namespace_prefix("topk_forward"),
    "(Tensor indices, Tensor weight, Tensor vals, Tensor bias, Tensor target, bool needs_grad, bool needs_pairs)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
)
torch.library.impl(add_op_namespace_prefix("topk_forward"), "default", _topk_forward)

torch.library.define(
    add_op_namespace_prefix("topk_backward"),
    "(Tensor grad_out, Tensor recon_grad, Tensor units, Tensor weight, Tensor vals, ScalarType bias_dtype,"
    " Tensor[] pairs, bool needs_weight, bool needs_vals, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(add_op_namespace_prefix("topk_backward"), "default", _topk_backward)


@torch.library.register_fake(add_op_namespace_prefix("topk_forward"))
def _topk_forward_fake(indices, weight, vals, bias, target, needs_grad, needs_pairs):
    dtype = compute_dtype(weight, vals, bias, target)
    shape = (target.shape[0], _row_width(weight, dtype)) if needs_grad else (0,)
    narrow = needs_pairs and _is_narrow(indices.shape[1], weight, vals, bias, target)
    recon_grad = weight.new_empty(shape, dtype=torch.float16 if narrow else dtype)
    units = weight.new_empty(target.shape[0] if narrow else 0, dtype=dtype)
    pairs = ()
    if needs_pairs:
        bias_pairs = indices.shape[0]
        pairs = new_pairs(indices, weight.shape[0], dtype, bias_pairs=bias_pairs, empty=torch.Tensor.new_empty)
    return units.new_empty(()), recon_grad, units, list(pairs)


@torch.library.register_fake(add_op_namespace_prefix("topk_backward"))
def _topk_backward_fake(
    grad_out, recon_grad, units, weight, vals, bias_dtype, pairs, needs_weight, needs_vals, needs_bias
):
    return (
        weight.new_empty(weight.shape if needs_weight else (0,)),
        vals.new_empty(vals.shape if needs_vals else (0,)),
        weight.new_empty(weight.shape[1] if needs_bias else 0, dtype=bias_dtype),
    )


class TopKSAELoss(torch.autograd.Function):
    """The two ops above as one differentiable function, see `triton_topk_sae_loss`.

    It calls them through torch's dispatcher, which is a tenth of a small step. Straight calls would read the memory of
    tensors that torch negates lazily, with the wrong sign, and would not be seen by modes, tracers and profilers.
    """

    @staticmethod
    def forward(ctx, indices, weight, vals, bias, target, needs_grad):
        needs_pairs = needs_grad and any(ctx.needs_input_grad[1:3])
        loss, recon_grad, units, pairs = ops.topk_forward(indices, weight, vals, bias, target, needs_grad, needs_pairs)
        ctx.save_for_backward(recon_grad, units, *savable(weight, vals), *pairs)
        ctx.bias_dtype, ctx.target_dtype = bias.dtype, target.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivative("triton_topk_sae_loss")
        recon_grad, units, weight, vals, *pairs = ctx.saved_tensors
        _, *needs, needs_target, _ = ctx.needs_input_grad
        grads = (None,) * 3
        if any(needs):
            grads = ops.topk_backward(grad_out, recon_grad, units, weight, vals, ctx.bias_dtype, pairs, *needs)
            grads = (grad if needed else None for grad, needed in zip(grads, needs))
        target_grad = None
        if needs_target:
            scale = -grad_out * units[:, None] if units.numel() else -grad_out
            target_grad = (recon_grad[:, : weight.shape[1]] * scale).to(ctx.target_dtype)
        return None, *grads, target_grad, None


def triton_topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of a TopK sparse autoencoder's reconstruction, fused with the sparse decode.

    ``loss = mean over b, d of (bias + sum_i vals[b, i] * weight[indices[b, i]] - target[b])[d] ** 2``. The order of a
    sample's features does not matter; features that repeat add up. (TopK autoencoders: Gao et al., arXiv 2406.04093,
    section 2.3.)

    Args:
        indices: ``[B, K]`` int32 or int64, the active features of each sample, in ``[0, F)``. One out of range is not
            followed and makes the loss and every gradient that its sample has a part in NaN (it may count as any
            other); ``FLEX_SAE_CHECK_INDICES=1`` in the environment raises IndexError instead, at the cost of a device
            synchronisation.
        weight: ``[F, D]``, the decoder. Rows with unit stride are read in place, also of a slice; another layout, such
            as the transpose of an ``nn.Linear`` weight, costs a copy of weight in the forward and in the backward pass.
        vals: ``[B, K]``, the activations.
        bias: ``[D]``.
        target: ``[B, D]``, what to reconstruct.

    weight, vals, bias and target are float16, bfloat16, float32 or float64 in any mixture. Sums are float32, or float64
    if any of the four is, and are rounded once, where they are stored. Where all four are bfloat16 and K >= 48, the
    gradients are taken of residuals that were rounded to 11 bits before, three more than the gradients keep (to fewer
    below 2e-9 of the largest of their sample), and weights beyond 1e34 / D may overflow.

    Returns:
        0-dim float32 (float64 if any input is) tensor, differentiable once in weight, vals, bias and target. The same
        inputs give the same bits. Tensors on a CPU go to `topk_sae_loss`.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit together, or B >= 2**31, K or F > 2**31 - 2**16, D > 2**20,
            B * (K + 1) > 2**32 - 2**22, B * (D + 31) >= 2**36 or (F + 2**16) * (D + 255) > 2**39.
    """
    check_inputs(indices, weight, vals, bias, target)
    if not runs_triton(indices):
        return topk_sae_loss(indices, weight, vals, bias, target)
    with no_grad_in_inference_mode():
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, vals, bias, target))
        return TopKSAELoss.apply(indices, weight, vals, bias, target, needs_grad)


def topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """`triton_topk_sae_loss` in plain torch, on any device: the same arguments, semantics and errors.

    It gathers ``[B, K, D]`` numbers and leaves the gradients to autograd.
    """
    check_inputs(indices, weight, vals, bias, target)
    dtype = compute_dtype(weight, vals, bias, target)
    rows, vals = select(indices, weight, vals, dtype)
    recon = bias.to(dtype) + (vals.unsqueeze(-1) * rows).sum(1)
    return (recon - target.to(dtype)).square().mean()

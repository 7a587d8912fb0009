"""Encoder, decode and losses in plain torch, for any device: the definition of what the kernels compute, with the same
arguments, semantics and errors. Gradients are autograd's."""

from typing import Optional, Union

import torch

from .checks import (
    check_decode_inputs,
    check_encode_inputs,
    check_inputs,
    check_nested_inputs,
    check_sparse_encode_inputs,
)
from .dispatch import compute_dtype, linear_dtype, promoted_dtype


def topk_sae_loss(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    *,
    sample_weight: Optional[torch.Tensor] = None,  # [B]
    return_recon: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`triton_topk_sae_loss` in plain torch. It gathers ``[B, K, D]`` numbers."""
    check_inputs(indices, weight, vals, bias, target, sample_weight)
    return unchecked_topk_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon)


def hierarchical_sae_loss(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    *,
    sample_weight: Optional[torch.Tensor] = None,  # [B]
    return_recon: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`triton_hierarchical_sae_loss` in plain torch. It holds ``[B, K, D]`` numbers several times over."""
    check_inputs(indices, weight, vals, bias, target, sample_weight, ordered=True)
    return unchecked_hierarchical_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon)


def nested_sae_loss(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    ends: torch.Tensor,  # [L], or [B, L]
) -> torch.Tensor:
    """`triton_nested_sae_loss` in plain torch. It holds ``[B, K, D]`` and ``[B, L, D]`` numbers several times over."""
    check_nested_inputs(indices, weight, vals, bias, target, ends)
    return unchecked_nested_sae_loss(indices, weight, vals, bias, target, ends)


def topk_encode(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    k: int,
    *,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_topk_encode` in plain torch. It holds ``[B, F]`` numbers several times over."""
    check_encode_inputs(x, weight, bias, k)
    return unchecked_topk_encode(x, weight, bias, k, relu, linear_dtype(x, weight, bias))


def sparse_encode(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    indices: torch.Tensor,  # [B, K], or [P]
    *,
    offsets: Optional[torch.Tensor] = None,  # [B + 1]
) -> torch.Tensor:
    """`triton_sparse_encode` in plain torch. It gathers ``[B, K, D]`` numbers."""
    check_sparse_encode_inputs(x, weight, bias, indices, offsets)
    return unchecked_sparse_encode(x, weight, bias, indices, offsets, linear_dtype(x, weight, bias))


def sae_decode(
    indices: torch.Tensor,  # [B, K], or [P]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # as indices
    bias: Optional[torch.Tensor] = None,  # [D]
    *,
    offsets: Optional[torch.Tensor] = None,  # [B + 1]
) -> torch.Tensor:
    """`triton_sae_decode` in plain torch. It gathers ``[B, K, D]`` numbers."""
    check_decode_inputs(indices, weight, vals, bias, offsets)
    return unchecked_sae_decode(indices, weight, vals, bias, offsets, promoted_dtype(weight, vals, bias))


def unchecked_topk_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon):
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    recon = bias.to(dtype) + _terms(indices, weight, vals, dtype).sum(1)
    loss = _weighted_mean((recon - target.to(dtype)).square(), sample_weight)
    return (loss, recon.detach().to(promoted_dtype(weight, vals, bias))) if return_recon else loss


def unchecked_hierarchical_sae_loss(indices, weight, vals, bias, target, sample_weight, return_recon):
    dtype = compute_dtype(weight, vals, bias, target, sample_weight)
    terms = _terms(indices, weight, vals, dtype)
    recons = bias.to(dtype) + terms.cumsum(1)
    loss = _weighted_mean((recons - target.to(dtype).unsqueeze(1)).square(), sample_weight)
    if not return_recon:
        return loss
    recon = bias.to(dtype) + terms.sum(1)  # where K is 0 there is no last prefix
    return loss, recon.detach().to(promoted_dtype(weight, vals, bias))


def unchecked_nested_sae_loss(indices, weight, vals, bias, target, ends):
    dtype = compute_dtype(weight, vals, bias, target)
    (B, K), L = indices.shape, ends.shape[-1]
    ends = ends.long().expand(B, L)
    before = torch.cat([ends.new_zeros(B, 1), ends[:, :-1]], dim=1)
    wrong = ((ends < before) | (ends > K)).cumsum(1) > 0
    outside = torch.arange(K, device=ends.device) >= ends[:, -1:]
    indices, vals = indices.masked_fill(outside, 0), vals.masked_fill(outside, 0)
    # The sums over 0, 1, .., K features
    sums = torch.nn.functional.pad(_terms(indices, weight, vals, dtype).cumsum(1), (0, 0, 1, 0))
    chosen = sums.gather(1, ends.clamp(0, K).unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
    poison = wrong.to(dtype).masked_fill(wrong, float("nan")).unsqueeze(-1)
    return (bias.to(dtype) + chosen + poison - target.to(dtype).unsqueeze(1)).square().mean((0, 2))


def _weighted_mean(squares, sample_weight):
    """The mean of squares [B, ..], each sample times its weight."""
    if sample_weight is not None:
        squares = squares * sample_weight.to(squares.dtype).view(-1, *[1] * (squares.dim() - 1))
    return squares.mean()


def linear(x, weight, bias, dtype):
    """``x @ weight.T + bias``, [B, F], computed in ``dtype``."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def unchecked_topk_encode(x, weight, bias, k, relu, dtype):
    vals, indices = linear(x, weight, bias, dtype).sort(dim=1, descending=True, stable=True)
    vals, indices = vals[:, :k].contiguous(), indices[:, :k].contiguous()
    return vals.relu() if relu else vals, indices


def unchecked_sparse_encode(x, weight, bias, indices, offsets, dtype):
    accumulated = torch.promote_types(dtype, torch.float32)
    B, F = len(x), len(weight)
    samples = _samples(indices, offsets)
    # Spare room gets a row of zeros, and no gradient from it.
    x = torch.cat([x.to(accumulated), x.new_zeros(1, x.shape[1], dtype=accumulated)])
    exists = samples < B
    features = torch.where(exists, indices.flatten(), 0)
    rows = features.clamp(0, F - 1)
    pre = (x[samples] * weight.to(accumulated)[rows]).sum(1)
    if bias is not None:
        pre = pre + bias.to(accumulated)[rows]
    return torch.where(exists, pre * _poison(features, F, accumulated), 0.0).to(dtype).view(indices.shape)


def unchecked_sae_decode(indices, weight, vals, bias, offsets, dtype):
    accumulated = torch.promote_types(dtype, torch.float32)
    if offsets is None:
        recon = _terms(indices, weight, vals, accumulated).sum(1)
    else:
        samples = _samples(indices, offsets)
        exists = samples < len(offsets) - 1
        features, vals = torch.where(exists, indices, 0), torch.where(exists, vals, 0.0)
        terms = _terms(features, weight, vals, accumulated)
        # Spare room adds up in a row of its own.
        recon = terms.new_zeros(len(offsets), terms.shape[1]).index_add(0, samples, terms)[:-1]
    if bias is not None:
        recon = recon + bias.to(accumulated)
    return recon.to(dtype)


def _samples(indices, offsets):
    """The sample of each pair, [P]; B in spare room."""
    if offsets is None:
        return torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
    places = torch.arange(len(indices), dtype=offsets.dtype, device=indices.device)
    samples = torch.searchsorted(offsets, places, right=True) - 1
    return torch.where(samples < 0, len(offsets) - 1, samples)


def _terms(indices, weight, vals, dtype):
    """``vals * weight[indices]``, D numbers for each pair. An index out of range is not followed and gives NaN."""
    F = weight.shape[0]
    return (vals.to(dtype) * _poison(indices, F, dtype)).unsqueeze(-1) * weight.to(dtype)[indices.clamp(0, F - 1)]


def _poison(indices, F, dtype):
    """1, or NaN for an index out of range."""
    return torch.where((indices >= 0) & (indices < F), 1.0, float("nan")).to(dtype)

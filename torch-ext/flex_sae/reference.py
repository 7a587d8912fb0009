"""The losses in plain torch, for any device: the definition of what the kernels compute, with the same arguments,
semantics and errors. Gradients are autograd's."""

import torch

from .checks import check_inputs
from .dispatch import compute_dtype


def topk_sae_loss(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
) -> torch.Tensor:
    """`triton_topk_sae_loss` in plain torch. It gathers ``[B, K, D]`` numbers."""
    check_inputs(indices, weight, vals, bias, target)
    return unchecked_topk_sae_loss(indices, weight, vals, bias, target)


def hierarchical_sae_loss(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
) -> torch.Tensor:
    """`triton_hierarchical_sae_loss` in plain torch. It holds ``[B, K, D]`` numbers several times over."""
    check_inputs(indices, weight, vals, bias, target, ordered=True)
    return unchecked_hierarchical_sae_loss(indices, weight, vals, bias, target)


def unchecked_topk_sae_loss(indices, weight, vals, bias, target):
    dtype = compute_dtype(weight, vals, bias, target)
    recon = bias.to(dtype) + _terms(indices, weight, vals, dtype).sum(1)
    return (recon - target.to(dtype)).square().mean()


def unchecked_hierarchical_sae_loss(indices, weight, vals, bias, target):
    dtype = compute_dtype(weight, vals, bias, target)
    recons = bias.to(dtype) + _terms(indices, weight, vals, dtype).cumsum(1)
    return (recons - target.to(dtype).unsqueeze(1)).square().mean()


def _terms(indices, weight, vals, dtype):
    """``vals[b, i] * weight[indices[b, i]]``, [B, K, D]. An index out of range is not followed and gives NaN."""
    F = weight.shape[0]
    poison = torch.where((indices >= 0) & (indices < F), 1.0, float("nan")).to(dtype)
    return (vals.to(dtype) * poison).unsqueeze(-1) * weight.to(dtype)[indices.clamp(0, F - 1)]

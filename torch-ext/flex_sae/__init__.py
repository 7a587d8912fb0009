"""Fused Triton decoder losses for TopK and HierarchicalTopK sparse autoencoders (arXiv 2505.24473)."""

from .hierarchical_kernels import triton_hierarchical_sae_loss
from .reference import hierarchical_sae_loss, topk_sae_loss
from .topk_kernels import triton_topk_sae_loss

__all__ = [
    "hierarchical_sae_loss",
    "topk_sae_loss",
    "triton_hierarchical_sae_loss",
    "triton_topk_sae_loss",
]

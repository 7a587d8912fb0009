"""Fused Triton decoder losses for TopK and HierarchicalTopK sparse autoencoders (arXiv 2505.24473)."""

from .hierarchical_kernels import hierarchical_sae_loss, triton_hierarchical_sae_loss
from .topk_kernels import topk_sae_loss, triton_topk_sae_loss

__all__ = [
    "hierarchical_sae_loss",
    "topk_sae_loss",
    "triton_hierarchical_sae_loss",
    "triton_topk_sae_loss",
]

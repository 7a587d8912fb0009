"""Fused Triton functions for training TopK and HierarchicalTopK sparse autoencoders (arXiv 2505.24473): the encoder
with its selection, the decode, and the decoder losses."""

from .decode_kernels import triton_sae_decode
from .encode_kernels import triton_sparse_encode, triton_topk_encode
from .hierarchical_kernels import triton_hierarchical_sae_loss
from .nested_kernels import triton_nested_sae_loss
from .reference import (
    hierarchical_sae_loss,
    nested_sae_loss,
    sae_decode,
    sparse_encode,
    topk_encode,
    topk_sae_loss,
)
from .topk_kernels import triton_topk_sae_loss

__all__ = [
    "hierarchical_sae_loss",
    "nested_sae_loss",
    "sae_decode",
    "sparse_encode",
    "topk_encode",
    "topk_sae_loss",
    "triton_hierarchical_sae_loss",
    "triton_nested_sae_loss",
    "triton_sae_decode",
    "triton_sparse_encode",
    "triton_topk_encode",
    "triton_topk_sae_loss",
]

"""Train with EleutherAI's sparsify (`eai-sparsify`) on these kernels.

Swaps two functions that `sparsify.sparse_coder` calls: the sparse decode, also that of AuxK and Multi-TopK, and the
encoder, which then keeps neither the pre-activations `[B, F]` nor, in backward, a product of `[B, k, D]`. Call `use()`
in every process before `Trainer(...).fit()`, and `use(encoder=False)` with `auxk_alpha`, `multi_topk` or
`activation="groupmax"`, which need all pre-activations or another selection. A feature selected with an activation of 0
has no gradient here; in sparsify's encoder it has one.
"""

from kernels import get_kernel
from sparsify import sparse_coder
from sparsify.fused_encoder import EncoderOutput

flex = get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])


def decode(top_indices, top_acts, weight_t):  # [B, k], [B, k], [D, F]
    return flex.triton_sae_decode(top_indices, weight_t.mT, top_acts)


def encode(x, weight, bias, k, activation):  # [B, D], [F, D], [F]
    if activation != "topk":
        raise ValueError(f"activation must be 'topk', got {activation!r}: call use(encoder=False)")
    return EncoderOutput(*flex.triton_topk_encode(x, weight, bias, k), pre_acts=None)


def use(encoder=True):
    sparse_coder.decoder_impl = decode
    if encoder:
        sparse_coder.fused_encoder = encode

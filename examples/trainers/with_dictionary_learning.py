"""Train with dictionary-learning on these kernels: pass a class from here as `dict_class`.

    TopKTrainer(..., dict_class=FlexTopK)
    BatchTopKTrainer(..., dict_class=FlexBatchTopK)

Swaps `decode`: the dense products with codes `[B, F]`, one in forward and two in backward, become sums over the B * k
active pairs. Encoder, AuxK and checkpoints stay the trainer's. Without gradients decode is the trainer's too, since
codes that a threshold chose may have any number of nonzeros: evaluate under `torch.no_grad()`. What `from_pretrained`
loads of FlexTopK has the usual layout, and decode copies its weight.
"""

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from kernels import get_kernel
from pairs import ragged_pairs

flex = get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])


class FlexDecode:
    def __init__(self, activation_dim, dict_size, k):
        super().__init__(activation_dim, dict_size, k)
        # [D, F] with the strides of [F, D]: its transpose is read in place, and so are the optimizer's moments
        self.decoder.weight.data = self.decoder.weight.data.t().contiguous().t()

    def decode(self, codes):
        if not torch.is_grad_enabled():
            return super().decode(codes)
        indices, vals, offsets = ragged_pairs(codes, len(codes) * int(self.k))
        return flex.triton_sae_decode(indices, self.decoder.weight.t(), vals, self.b_dec, offsets=offsets)


class FlexTopK(FlexDecode, AutoEncoderTopK):
    pass


class FlexBatchTopK(FlexDecode, BatchTopKSAE):
    pass

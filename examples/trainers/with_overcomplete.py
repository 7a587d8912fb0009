"""Train overcomplete's TopKSAE and BatchTopKSAE on these kernels.

Subclasses that override `decode`: in training, codes become pairs and the three dense products of the dictionary (in
forward, and in backward for codes and dictionary) become sparse ones. Use them with `train_sae` in place of
overcomplete's. Encoder, selection and criterion are overcomplete's, which hands dense codes from one to the next, so
that codes and their gradient still take `[B, F]`. Should ties leave BatchTopKSAE with more than top_k codes, the loss
is NaN. overcomplete 0.3 needs matplotlib < 3.11.
"""

from kernels import get_kernel
from overcomplete import sae
from pairs import ragged_pairs

flex = get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])


def decode(model, codes, most_nonzeros):  # codes [B, F]
    indices, vals, offsets = ragged_pairs(codes, most_nonzeros)
    return flex.triton_sae_decode(indices, model.get_dictionary(), vals, offsets=offsets)


class TopKSAE(sae.TopKSAE):
    def decode(self, z):
        return decode(self, z, len(z) * self.top_k)


class BatchTopKSAE(sae.BatchTopKSAE):  # top_k counts those of the whole batch; in eval mode a threshold decides
    def decode(self, z):
        return decode(self, z, self.top_k) if self.training else super().decode(z)

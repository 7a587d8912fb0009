"""Train with sae-lens on these kernels: make a class from here of the trainer's config.

    SAETrainer(cfg, sae=FlexTopK(TopKTrainingSAEConfig(...)), data_provider=...)
    LanguageModelSAETrainingRunner(cfg, override_sae=FlexTopK(cfg.sae))

FlexBatchTopK is for BatchTopKTrainingSAEConfig. Swaps `decode`: the dense products with activations `[B, F]`,
one in forward and two in backward, and their rescaling become sums over the B * k active pairs. Encoder, losses, AuxK,
hooks and checkpoints stay the trainer's. BatchTopK's k may be fractional.
"""

from kernels import get_kernel
from pairs import ragged_pairs
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE

flex = get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])


class FlexDecode:
    def decode(self, feature_acts):
        if feature_acts.is_sparse:
            raise ValueError("set use_sparse_activations=False: its sparse tensors are not needed here")
        codes = feature_acts.flatten(0, -2)
        indices, vals, offsets = ragged_pairs(codes, int(len(codes) * self.cfg.k))
        if self.cfg.rescale_acts_by_decoder_norm:
            vals = vals / self.W_dec.norm(dim=1)[indices]
        recon = flex.triton_sae_decode(indices, self.W_dec, vals, self.b_dec, offsets=offsets)
        recon = self.hook_sae_recons(recon.view(*feature_acts.shape[:-1], -1))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recon), self.d_head)


class FlexTopK(FlexDecode, TopKTrainingSAE):
    pass


class FlexBatchTopK(FlexDecode, BatchTopKTrainingSAE):
    pass

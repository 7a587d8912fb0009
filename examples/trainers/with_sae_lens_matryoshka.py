"""Train sae-lens' Matryoshka SAE on these kernels: FlexMatryoshkaBatchTopK(MatryoshkaBatchTopKTrainingSAEConfig(...)).

As with_sae_lens.py, and the losses of the inner levels, a dense product each in forward and two in backward, become one
call over the active pairs. Rows get the length of the batch's longest, for which each step waits for the GPU.
"""

import torch
from pairs import nested_pairs
from sae_lens import MatryoshkaBatchTopKTrainingSAE
from with_sae_lens import FlexDecode, flex


class FlexMatryoshkaBatchTopK(FlexDecode, MatryoshkaBatchTopKTrainingSAE):
    def training_forward_pass(self, step_input):
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError("normalize_activations must not rescale each reconstruction: the losses are fused")
        output = super(MatryoshkaBatchTopKTrainingSAE, self).training_forward_pass(step_input)
        codes, widths = output.feature_acts, self.cfg.matryoshka_widths[:-1]  # the last is the base's mse_loss
        if not widths:
            return output
        longest = int((codes != 0).sum(1).max())
        K = min(-(-longest // 32) * 32, codes.shape[1])  # each K is compiled for: few of them
        indices, vals, ends = nested_pairs(codes, max(K, 1), torch.tensor(widths, device=codes.device))
        if self.cfg.rescale_acts_by_decoder_norm:
            vals = vals / self.W_dec.norm(dim=1)[indices]
        losses = flex.triton_nested_sae_loss(indices, self.W_dec, vals, self.b_dec, step_input.sae_in, ends)
        losses = losses * self.cfg.d_in  # a sum over D
        output.losses.update({f"inner_mse_loss_{width}": loss for width, loss in zip(widths, losses, strict=True)})
        output.loss = output.loss + losses.sum()
        return output

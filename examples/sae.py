"""A sparse autoencoder on flex_sae's functions, with AuxK for dead features; `train_sae.py` trains it."""

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, mse_loss, normalize

AUXK_SHARE = 4  # AuxK sees one in four samples: rows are shuffled, so that its gradient stays unbiased


class AddRows(torch.autograd.Function):
    """The parameter itself; in backward, gradients of some of its rows are added to its gradient.

    They go through backward since DDP and FSDP2 reduce what comes out of it."""

    @staticmethod
    def forward(ctx, parameter, auxk, position):
        ctx.auxk, ctx.position = auxk, position
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad):
        # In place: the parameter has one use, so that nothing else holds its gradient.
        return grad.index_add_(0, ctx.auxk.rows, ctx.auxk.grads[ctx.position].to(grad.dtype)), None, None


class AuxK:
    """AuxK (Gao et al., arXiv 2406.04093, A.2) of one step: dead features reconstruct what the others leave over.

    `dead` is int64 [n], padded with -1. `watch` each parameter where it is used, then call `fill` before backward."""

    def __init__(self, dead: torch.Tensor):
        self.padding = dead < 0
        self.rows = dead.clamp(min=0)
        self.copies, self.grads = [], ()

    def __bool__(self) -> bool:
        return len(self.rows) > 0

    def watch(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter [F, ..]; `fill` adds to its gradient that of its dead rows."""
        if not self:
            return parameter
        # Autograd of parameter[rows] would write a gradient of all rows, nearly all zeros.
        self.copies.append(parameter.detach()[self.rows].requires_grad_())
        return AddRows.apply(parameter, self, len(self.copies) - 1)

    @torch.enable_grad()
    def fill(self, x: torch.Tensor, residual: torch.Tensor, coefficient: float) -> None:
        """Compute the gradients of the watched encoder weight, encoder bias and decoder weight, in this order, of
        coefficient times AuxK. x (without the pre-bias) and residual [B, D] are constants."""
        k = max(1, min(x.shape[1] // 2, len(self.rows)))
        weight, bias, decoder = self.copies
        codes = linear(x, weight, bias.masked_fill(self.padding, -torch.inf)).relu()
        least = codes.detach().topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        loss = mse_loss((codes * (codes >= least)) @ decoder, residual)
        self.grads = torch.autograd.grad(coefficient * loss, self.copies)


class Encoder(nn.Module):
    def __init__(self, weight: torch.Tensor, encode):
        super().__init__()
        self.weight = nn.Parameter(weight)  # [F, D]
        self.bias = nn.Parameter(weight.new_zeros(len(weight)))  # [F]
        self.encode = encode

    def forward(self, x, k, auxk):
        return self.encode(x, auxk.watch(self.weight), auxk.watch(self.bias), k)


class Decoder(nn.Module):
    def __init__(self, weight: torch.Tensor, loss):
        super().__init__()
        self.weight = nn.Parameter(weight)  # [F, D], rows of length 1
        self.loss = loss

    def forward(self, indices, vals, bias, target, auxk):
        return self.loss(indices, auxk.watch(self.weight), vals, bias, target, bool(auxk))


class SAE(nn.Module):
    """Encoder and loss in one `forward`, as DDP and FSDP2 want it.

    x is multiplied by `scale`, so that its mean norm is sqrt(D), and the pre-bias is subtracted before the encoder."""

    def __init__(self, options: argparse.Namespace, D: int, flex, device: torch.device):
        super().__init__()
        generator = torch.Generator(device).manual_seed(options.seed)
        rows = normalize(torch.randn(options.F, D, generator=generator, device=device), dim=1)
        self.K, self.auxk_coefficient = options.K, options.auxk_coefficient
        self.encoder = Encoder(rows, flex.triton_topk_encode)
        self.decoder = Decoder(rows.clone(), make_loss(options, flex, device))
        self.bias = nn.Parameter(torch.zeros(D, device=device))
        self.capacity = 0  # of the list of dead features that AuxK works on
        for name, shape, dtype in (
            ("scale", (), torch.float32),
            ("step", (), torch.int64),  # steps begun
            ("last_fired", (options.F,), torch.int64),  # the step
            ("dead", (options.F,), torch.int64),  # indices of dead features, then -1
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.dead.fill_(-1)
        # The first step with a non-finite loss, 0 for none
        self.register_buffer("broken", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    @torch.no_grad()
    def fit_to(self, mean_norm: torch.Tensor, mean: torch.Tensor) -> None:
        """Set the scale by the mean norm [] of activations, and the pre-bias to their mean [D]."""
        self.scale.copy_(len(mean) ** 0.5 / mean_norm)
        self.bias.copy_(mean * self.scale)

    def forward(self, x):
        """x [B, D] to the loss, and without gradients [3 + D]: the loss, the mean squared error of all K features, and
        the mean square and the mean [D] of x without the pre-bias."""
        self.step += 1
        x = x.float() * self.scale
        centred = x - self.bias
        auxk = AuxK(self.dead[: self.capacity])
        vals, indices = self.encoder(centred, self.K, auxk)
        loss, error, recon = self.decoder(indices, vals, self.bias, x, auxk)
        with torch.no_grad():
            self.last_fired.scatter_reduce_(0, indices.flatten().long(), (vals > 0).flatten() * self.step, "amax")
            if auxk:
                some = slice(None, None, AUXK_SHARE)  # the same samples, however many ranks have a slice of them
                auxk.fill(centred.detach()[some], x[some] - recon[some], self.auxk_coefficient)
            self.broken.copy_(torch.where((self.broken == 0) & ~loss.isfinite(), self.step, self.broken))
            statistics = torch.stack([loss.detach().float(), error, centred.square().mean()])
            return loss, torch.cat([statistics, centred.mean(0)])

    @torch.no_grad()
    def refresh_dead(self, dead_after: float) -> int:
        """List the features that have not fired for `dead_after` steps; their number. Waits for the GPU."""
        dead = (self.step - self.last_fired > dead_after).nonzero().squeeze(1)
        self.dead.fill_(-1)[: len(dead)] = dead
        return self.fit_capacity()

    def fit_capacity(self) -> int:
        """The number of dead features. AuxK's list is longer by up to a quarter or 64, so that CUDA graphs are few."""
        n = int((self.dead >= 0).sum())
        grain = max(64, 1 << n.bit_length() >> 3)
        self.capacity = min(-(-n // grain) * grain, len(self.dead)) if self.auxk_coefficient > 0 else 0
        return n


def make_loss(options: argparse.Namespace, flex, device: torch.device):
    """A function of (indices, weight, vals, bias, target, want_recon) that gives the loss, the mean squared error of
    all K features, and their reconstruction (or None if not wanted)."""
    if options.levels:
        ends = torch.tensor(options.levels, device=device)

        def nested(indices, weight, vals, bias, target, want_recon):
            losses = flex.triton_nested_sae_loss(indices, weight, vals, bias, target, ends)
            with torch.no_grad():
                recon = flex.triton_sae_decode(indices, weight, vals, bias) if want_recon else None
            return losses.mean(), losses[-1].detach(), recon

        return nested
    fused = getattr(flex, f"triton_{options.loss}_sae_loss")

    def loss_and_recon(indices, weight, vals, bias, target, want_recon):
        loss, recon = fused(indices, weight, vals, bias, target, return_recon=True)
        return loss, mse_loss(recon.detach().float(), target.detach()), recon

    return loss_and_recon


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that FSDP2 shards, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def remove_parallel(grad: torch.Tensor, weight: torch.Tensor) -> None:
    """Subtract from each row of grad [F, D] its part along the unit row of weight: a step keeps the length."""
    grad.addcmul_((grad * weight).sum(1, keepdim=True), weight, value=-1)


def normalize_rows(weight: torch.Tensor) -> None:
    weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))


@torch.no_grad()
def export(sae: SAE, folder: Path) -> None:
    """Write what `SAE.load_from_disk` of sae-lens loads. As rows keep their length 1, only biases need the scale."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": sae.encoder.weight.t(),
        "b_enc": sae.encoder.bias / sae.scale,
        "W_dec": sae.decoder.weight,
        "b_dec": sae.bias / sae.scale,
    }
    F, D = sae.decoder.weight.shape
    config = {
        "architecture": "topk",
        "d_in": D,
        "d_sae": F,
        "k": sae.K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "reshape_activations": "none",
        "metadata": {},
    }
    file = folder / "sae_weights.safetensors"
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written: {error}") from None
    (folder / "cfg.json").write_text(json.dumps(config, indent=2))

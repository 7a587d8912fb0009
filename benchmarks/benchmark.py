"""For `kernels benchmark .`: encoder and losses alone and with their gradients, beside torch, on a GPU."""

import torch
from kernels.benchmark import Benchmark


class _OnGPU:  # no Benchmark itself: `kernels benchmark` runs every class that is one
    seed = 0

    def setup(self) -> None:
        # self.device is "cuda" on a machine with torch for CUDA and no GPU.
        if self.device == "cpu" or not torch.accelerator.is_available():
            # `kernels benchmark` prints a RuntimeError as it is, without a traceback.
            raise RuntimeError(
                "This benchmark needs a GPU: on a CPU the functions are their torch references, "
                "so there is nothing to compare."
            )
        self.make_inputs(B=4096, K=64, F=65536, D=2304)


class _Loss(_OnGPU):
    name: str

    def make_inputs(self, B: int, K: int, F: int, D: int) -> None:
        self.loss, self.reference = (getattr(self.kernel, f"{prefix}{self.name}") for prefix in ("triton_", ""))
        self.indices = torch.randint(F, (B, K), device=self.device)
        weight = torch.randn(F, D, device=self.device).div_(D**0.5)
        vals = torch.rand(B, K, device=self.device).sort(dim=1, descending=True).values
        bias = torch.randn(D, device=self.device)
        self.leaves = [tensor.requires_grad_() for tensor in (weight, vals, bias)]
        self.target = torch.randn(B, D, device=self.device)

    def _gradients(self, function):
        # grad_out = B * D makes most gradients of weight and vals about 1 and those of bias 100 and more, where the
        # runner's tolerance of 0.01 means something.
        loss = function(self.indices, *self.leaves, self.target)
        weight_grad, vals_grad, bias_grad = torch.autograd.grad(
            loss, self.leaves, torch.full_like(loss, self.target.numel())
        )
        # Some rows stand for all of d weight: what is compared is copied within the time.
        return torch.cat([weight_grad[self.indices[0]].flatten(), vals_grad.flatten(), bias_grad])

    @torch.no_grad()
    def benchmark_loss(self):
        self.out = self.loss(self.indices, *self.leaves, self.target)

    @torch.no_grad()
    def verify_loss(self) -> torch.Tensor:
        return self.reference(self.indices, *self.leaves, self.target)

    def benchmark_step(self):
        self.out = self._gradients(self.loss)

    def verify_step(self) -> torch.Tensor:
        return self._gradients(self.reference)


class TopKBenchmark(_Loss, Benchmark):
    name = "topk_sae_loss"


class HierarchicalBenchmark(_Loss, Benchmark):
    name = "hierarchical_sae_loss"


def _torch_encode(x, weight, bias, k):
    return torch.topk(torch.nn.functional.linear(x, weight, bias).relu(), k, dim=1)


class EncoderBenchmark(_OnGPU, Benchmark):
    def make_inputs(self, B: int, K: int, F: int, D: int) -> None:
        self.k = K
        # Pre-activations that float32 holds exactly (sums of -1, 0 and 1, and a fraction of its own for each feature):
        # both sides see the same ones, and no two of a row are equal, of which torch.topk takes any.
        x, weight = (torch.randint(-1, 2, shape, device=self.device).float() for shape in ((B, D), (F, D)))
        bias = torch.randperm(F, device=self.device) / F
        self.leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        self.vals_grad = torch.randn(B, K, device=self.device)

    def _gradients(self, encode):
        vals, indices = encode(*self.leaves, self.k)
        x_grad, weight_grad, bias_grad = torch.autograd.grad(vals, self.leaves, self.vals_grad)
        # Some rows stand for all of d weight: what is compared is copied within the time.
        return torch.cat([x_grad.flatten(), weight_grad[indices[0]].flatten(), bias_grad])

    @torch.no_grad()
    def benchmark_encode(self):
        self.out = torch.cat(self.kernel.triton_topk_encode(*self.leaves, self.k))

    @torch.no_grad()
    def verify_encode(self) -> torch.Tensor:
        return torch.cat(_torch_encode(*self.leaves, self.k))

    def benchmark_step(self):
        self.out = self._gradients(self.kernel.triton_topk_encode)

    def verify_step(self) -> torch.Tensor:
        return self._gradients(_torch_encode)

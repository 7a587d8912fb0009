"""For `kernels benchmark .`: each loss alone and with its gradients, beside its torch reference, on a GPU."""

import torch
from kernels.benchmark import Benchmark


class _Loss:  # no Benchmark itself: `kernels benchmark` runs every class that is one
    seed = 0
    name: str

    def setup(self) -> None:
        # self.device is "cuda" on a machine with torch for CUDA and no GPU.
        if self.device == "cpu" or not torch.accelerator.is_available():
            # `kernels benchmark` prints a RuntimeError as it is, without a traceback.
            raise RuntimeError(
                "This benchmark needs a GPU: on a CPU the losses are their torch references, "
                "so there is nothing to compare."
            )
        self.make_inputs(B=4096, K=64, F=65536, D=2304)

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

"""Compile what the package launches, for a GPU that is not there: `python aot_worker.py TARGET OUT`, for test_aot.py.

A process of its own, because Triton decides at import whether its functions are interpreted. The launchers run on CPU
tensors under a driver that names a GPU and has none; each launch stops where the GPU would be needed. The JIT derives
what it compiles from the arguments, as on that GPU. OUT becomes a JSON list, an object per kernel.
"""

import json
import sys

import torch
from kernels import get_kernel
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class TargetOnly:
    """What the JIT asks of a driver before it launches."""

    def __init__(self, target):
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: target


# Columns that end in half a tile of the sums; and, for float32 alone, rows that are not aligned to 64 bytes.
D, ODD_D = 768, 1000
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The first is to be compiled and no other: they differ in their factors of 16, in being 1, and in how many bits a
# feature takes while pairs are sorted.
SIZES = (
    *((64, 256), (63, 256), (1, 256), (64, 255), (48, 1), (1024, 256), (1000, 512), (5000, 256)),
    *((64, 2**17), (63, 2**17 + 1), (1, 2**16 + 1)),
)


def rows(n, D, dtype, padding):
    """[n, D], slices of rows that are longer by ``padding``; without it a single row lies as in a transposed column."""
    return (
        torch.empty(D, 1, dtype=dtype).t()
        if n == 1 and not padding
        else torch.empty(n, D + padding, dtype=dtype)[:, :D]
    )


def launch_everything(flex, dtype, B, F, D, padding):
    """Every launch of decoder and encoders, with both algorithms of hierarchical gradients where a dtype has both."""
    ops, K = flex._ops.ops, 32
    accumulation = torch.promote_types(dtype, torch.float32)
    weight, target = (rows(n, D, dtype, padding) for n in (F, B))
    indices, vals = torch.arange(B * K).view(B, K) % F, torch.empty(B, K, dtype=dtype)
    inputs = indices, weight, vals, torch.empty(D, dtype=dtype), target
    scalar = torch.empty((), dtype=accumulation)
    _, _, residual = ops.topk_forward(*inputs, None, True, False)
    for needs_vals in (True, False):  # without it weight is not read
        ops.topk_backward(scalar, residual, indices, weight, vals, dtype, dtype, True, needs_vals, True, True)
    ops.topk_forward(*inputs, None, False, False)
    ops.topk_forward(*inputs, vals[:, 0], True, True)
    ops.hierarchical_forward(*inputs, None, False, False, False)
    for sample_weight, return_recon in ((None, False), (vals[:, 0], True)):
        _, _, *state = ops.hierarchical_forward(*inputs, sample_weight, True, True, return_recon)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            ops.hierarchical_backward(
                scalar, *state, indices, weight, vals, sample_weight, dtype, dtype, True, True, True, True
            )
    torch.use_deterministic_algorithms(False)
    for ends in (torch.empty(B, 3, dtype=torch.int64), torch.empty(1, dtype=torch.int64)):
        _, *state = ops.nested_forward(*inputs, ends, True)
        losses_grad = torch.empty(ends.shape[-1], dtype=accumulation)
        ops.nested_backward(losses_grad, *state, indices, weight, vals, ends, dtype, dtype, True, True, True, True)
    ops.nested_forward(*inputs, ends, False)
    features, offsets = torch.empty(F, dtype=dtype), torch.arange(0, B * K + 1, K)
    ops.topk_encode(target, weight, features, min(K, F), True, dtype)
    for pairs, starts in (((B, K), None), ((B * K,), offsets)):
        ops.sparse_encode(target, weight, features, indices.view(pairs), starts, dtype)
        grads = vals.view(pairs)
        ops.encode_backward(grads, target, weight, indices.view(pairs), starts, dtype, True, True, True)
        ops.sae_decode(indices.view(pairs), weight, grads, inputs[3], starts, dtype)
        ops.sae_decode_backward(target, indices.view(pairs), weight, grads, starts, dtype, True, True, True)


def main(target, out):
    flex = get_kernel("t-tech/flex-sae", version=1, trust_remote_code=["t-tech/flex-sae"])
    compiled, cached = [], []
    launcher, run = flex.launch._CachedLauncher, JITFunction.run
    launch = launcher._launch

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not known for known, *_ in compiled):
            compiled.append((kernel, {"kernel": self.fn.__name__, **step}))
        return kernel

    def launch_and_compare(self, grid, *args, **constants):
        before = len(cached)
        launch(self, grid, *args, **constants)
        # What is launched without the JIT is what it would have chosen.
        chosen = self._kernel.warmup(*args, grid=grid, **constants, **flex.launch._OPTIONS)
        assert cached[before:] in ([], [chosen]), self._kernel.fn.__name__

    JITFunction.run, launcher._launch = compile_only, launch_and_compare
    compiler.CompiledKernel.__getitem__ = lambda self, grid: lambda *args: cached.append(self)
    driver.set_active(TargetOnly(TARGETS[target]))
    problems = [(dtype, B, F, D, 0, n == 0) for dtype in DTYPES for n, (B, F) in enumerate(SIZES)]
    # Slices of rows of 1024, a single row among them
    problems += [(torch.float32, B, F, ODD_D, 24, n == 0) for n, (B, F) in enumerate(((64, 256), (1, 256), (64, 1)))]
    problems.append((torch.float32, *SIZES[0], ODD_D, 0, True))
    # 2 GiB of scratch, and nothing else that is new
    problems.append((torch.float32, 2**16, 256, D, 0, False))
    for dtype, B, F, columns, padding, first in problems:
        step = {"target": target, "dtype": str(dtype).removeprefix("torch."), "B": B, "F": F, "first": first}
        step["aligned"] = columns == D
        launch_everything(flex, dtype, B, F, columns, padding)
    assembly = "amdgcn" if target.startswith("gfx") else "sass"
    kernels = [
        {
            **facts,
            "cached": kernel in cached,
            "assembly": kernel.asm[assembly],
        }
        for kernel, facts in compiled
    ]
    with open(out, "w") as file:
        json.dump(kernels, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

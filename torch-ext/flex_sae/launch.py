"""Kernel launches that take less host time than Triton's own.

At every launch Triton asks each argument for its type and its divisibility by 16 to find the compiled kernel, and the
driver where each tensor lies. Small batches wait for the host: without this cache a step of B=256, K=32, F=16384, D=768
takes 36 to 53% longer.
"""

import functools

import triton.language as tl

from .dispatch import INTERPRETED

# Allow fused multiply-adds: Triton's default up to 3.9, not from 3.10 on.
_OPTIONS = {"enable_fp_fusion": True}


class _CachedLauncher:
    """Launches a Triton kernel, ``launcher[grid](...)``, with the compiled kernel that Triton would choose.

    On CUDA that follows from the device, the dtypes of tensors, the specialised integers and the constants, as long as
    all tensors start at multiples of 16 bytes and all integers fit 32 bits. First launches, other tensors and integers,
    and other GPUs go through Triton. Given up: debug and instrumentation settings that change after a kernel's first
    launch, and Triton's pre-run hooks.
    """

    def __init__(self, kernel):
        self._kernel = kernel
        self._compiled = {}
        self._constants = [p.name for p in kernel.params if p.is_constexpr]
        self._pointers = sum(p.name.endswith("_ptr") for p in kernel.params)
        integers = kernel.params[self._pointers : len(kernel.params) - len(self._constants)]
        self._specialized = [p.num for p in integers if not p.do_not_specialize]

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **constants):
        key, addresses = self._key_and_addresses(args, constants)
        compiled = self._compiled.get(key)
        if compiled is not None:
            # Given a tensor instead of its address, Triton would ask the driver where it lies.
            integers = args[self._pointers :]
            compiled[(*grid, 1, 1)[:3]](*addresses, *integers, *[constants[name] for name in self._constants])
        else:
            compiled = self._kernel[grid](*args, **constants, **_OPTIONS)
            if key is not None and tl.target_info.is_cuda():
                self._compiled[key] = compiled

    def _key_and_addresses(self, args, constants):
        """The cache key, or None where Triton has to choose; and the addresses of the tensors."""
        key, addresses, all_bits, first = [args[n] for n in self._specialized], [], 0, None
        for tensor in args[: self._pointers]:
            if tensor is None:
                key.append(None)
                addresses.append(None)
                continue
            if first is None:
                first, device = tensor, tensor.get_device()
            elif tensor.get_device() != device:
                raise ValueError(
                    f"all tensors of a launch must be on one device, got {first.device} and {tensor.device}"
                )
            key.append(tensor.dtype)
            addresses.append(tensor.data_ptr())
            all_bits |= addresses[-1]
        if all_bits % 16 or max(args[self._pointers :]) >= 2**31:
            return None, addresses
        return (device, *key, *constants.values()), addresses


def cached_launch(kernel):
    """A decorator for kernels whose parameters are pointers, with names in ``_ptr``, then integers, then constants;
    grids are tuples, and constants are given by name."""
    return kernel if INTERPRETED else _CachedLauncher(kernel)

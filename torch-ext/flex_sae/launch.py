"""Kernel launches that take less of the host's time, and less of the device's between two kernels.

At every launch Triton asks each argument for its type and its divisibility by 16 to find the compiled kernel, and the
driver about each tensor's memory. With less to ask, a launch takes 13 to 15 us on the host of an H200, where Triton's
take 18 to 24. Small batches wait for the host: a step with B=256, K=32, F=16384, D=768 takes 3 to 11% less time.
"""

import functools

import triton
import triton.language as tl

from .checks import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def wait_for_memory():
    """What a kernel starts with, so that it can be launched before the kernel before it has left the GPU: from here on
    it sees that kernel's memory (CUDA's programmatic dependent launch).

    On an H200 (B=4096, F=65536, D=2304) a deterministic hierarchical step, which has many launches, takes 2% less time.
    If kernels also let the next one start before they end, TopK steps take up to 40% longer."""
    if not _INTERPRETED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


def _options():
    """What the compiler is asked for on the current device."""
    # A product is added before it is rounded, which Triton does by default up to 3.9.
    options = {"enable_fp_fusion": True}
    if tl.target_info.cuda_capability_geq(9, 0):  # as in `wait_for_memory`; the launchers of others know no such option
        options["launch_pdl"] = True
    return options


class _QuickLauncher:
    """Launches a Triton kernel, ``launcher[grid](...)``, with the compiled kernel that Triton would choose.

    For CUDA, Triton's choice follows from the dtypes of tensors, the integers that are specialised and the constants,
    if all memory starts at multiples of 16 bytes and all integers fit 32 bits. Where they do not, and where it follows
    from something new, Triton launches; so it does always for other GPUs, where more may count (on AMD, whether memory
    reaches 2 GiB). A setting of Triton that changes after that is not seen.
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

    def warmup(self, *args, **constants):
        """Compile what a launch would, and return it."""
        return self._kernel.warmup(*args, **constants, **_options())

    def _launch(self, grid, *args, **constants):
        key, addresses = self._key_and_addresses(args, constants)
        compiled = self._compiled.get(key)
        if compiled is not None:
            # Of a tensor Triton would ask the driver where its memory is; an address it takes as it is.
            integers = args[self._pointers :]
            compiled[(*grid, 1, 1)[:3]](*addresses, *integers, *[constants[name] for name in self._constants])
        else:
            compiled = self._kernel[grid](*args, **constants, **_options())
            if key is not None and tl.target_info.is_cuda():
                self._compiled[key] = compiled

    def _key_and_addresses(self, args, constants):
        """What the compiled kernel follows from, or None if Triton has to look at more; and the tensors' addresses."""
        key, addresses, union, device = [args[n] for n in self._specialized], [], 0, 0
        for tensor in args[: self._pointers]:
            if tensor is None:
                key.append(None)
                addresses.append(None)
            else:
                key.append(tensor.dtype)
                addresses.append(tensor.data_ptr())
                union |= addresses[-1]
                device |= tensor.get_device()  # -1, which has no compiled kernel, once a tensor is on a CPU
        if union % 16 or max(args[self._pointers :]) >= 2**31:
            return None, addresses
        return (device, *key, *constants.values()), addresses


def quick_launch(kernel):
    """A decorator for kernels whose parameters are pointers, with names in ``_ptr``, then integers, then constants, and
    which `wait_for_memory` first; grids are tuples, and constants are given by name. Integers are no bools, which the
    interpreter of Triton 3.6 does not take."""
    return kernel if INTERPRETED else _QuickLauncher(kernel)

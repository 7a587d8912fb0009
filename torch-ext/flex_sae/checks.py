"""What the losses accept, the dtype they compute in and where they run."""

import contextlib
import functools
import math
import os
from typing import Optional

import torch
import triton

# triton.jit decides at import whether kernels are interpreted, so this is decided at import too.
INTERPRETED = triton.knobs.runtime.interpret

# A launch takes fewer than 2**31 programs in its first dimension, which are samples, or features and pieces of heavy
# ones and of bias (up to 2**12 and, the square root of B, 46342), and at most 65535 in the second, tiles of 32 columns
# or more. In all they are fewer than 2**31, too: Triton multiplies in 32 bits and launches nothing, without an error,
# where the product is not positive. Sums over features have tiles of 256 columns or more, or all columns in one. Steps
# are counted in 32 bits, up to those of a tile that is loaded in advance.
_MAX_F, _MAX_D, _MAX_K, _MAX_PROGRAMS = 2**31 - 2**16, 2**20, 2**31 - 2**16, 2**31
# 32 bits hold the place of a pair, those of bias included, also of the few past the last one at which a program looks
# in advance.
_MAX_PAIRS = 2**32 - 2**22
# Terms of a forward kernel from which a second stream is used. On an H200 the device's time of a TopK step is 8, 20, 35
# us less with it at 2**24.6, 2**26.2, 2**27.2 terms, and the host's 40 to 80 us more.
_WORTH_A_STREAM = 2**27
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the five tensors fit together.

    With ``FLEX_SAE_CHECK_INDICES=1`` in the environment it also looks at the values of ``indices`` (a device
    synchronisation) and raises IndexError at the first one outside ``[0, F)``.
    """
    tensors = {"indices": indices, "weight": weight, "vals": vals, "bias": bias, "target": target}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    for name, tensor in tensors.items():
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "a nested tensor" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be dense (torch.strided), got {layout}")
        if name == "indices":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"indices must be int32 or int64, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    for name, dims in (("indices", "[B, K]"), ("weight", "[F, D]")):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name} must have shape {dims}, got {tuple(tensors[name].shape)}")
    B, K = indices.shape
    F, D = weight.shape
    if F == 0 or D == 0:
        raise ValueError(f"weight must have shape [F, D] with F >= 1 and D >= 1, got {(F, D)}")
    if F > _MAX_F or D > _MAX_D:
        raise ValueError(f"weight must have shape [F, D] with F <= 2**31 - 2**16 and D <= 2**20, got {(F, D)}")
    if B >= 2**31 or K > _MAX_K or B * (K + 1) > _MAX_PAIRS:
        limits = "B < 2**31, K <= 2**31 - 2**16 and B * (K + 1) <= 2**32 - 2**22"
        raise ValueError(f"indices must have shape [B, K] with {limits}, got {(B, K)}")
    if F != D and bias.shape == (F,) and target.shape == (B, F):
        raise ValueError(f"weight must have shape [F, D], got {(F, D)}, which is [D, F] for these bias and target")
    for name, dims, shape in (("vals", "[B, K]", (B, K)), ("bias", "[D]", (D,)), ("target", "[B, D]", (B, D))):
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {dims} = {shape}, got {tuple(tensors[name].shape)}")
    if B * (D + 31) >= 32 * _MAX_PROGRAMS:
        raise ValueError(f"target must have shape [B, D] with B * (D + 31) < 2**36, got {(B, D)}")
    if (F + 2**16) * (D + 255) > 256 * _MAX_PROGRAMS:
        raise ValueError(f"weight must have shape [F, D] with (F + 2**16) * (D + 255) <= 2**39, got {(F, D)}")
    if os.environ.get("FLEX_SAE_CHECK_INDICES") == "1":
        _check_indices(indices, F)


def _check_indices(indices: torch.Tensor, F: int) -> None:
    bad = ((indices < 0) | (indices >= F)).nonzero()
    if len(bad):
        b, k = bad[0].tolist()
        raise IndexError(f"indices must lie in [0, F) = [0, {F}), got {indices[b, k].item()} at [{b}, {k}]")


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def runs_triton(indices: torch.Tensor) -> bool:
    """Whether a problem goes to the kernels: on a device that Triton compiles for or in its interpreter, and with
    something to launch (B and K not 0). The torch reference answers the others."""
    return (INTERPRETED or indices.is_cuda or indices.is_xpu) and indices.numel() > 0


def unit_stride_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its rows can be read in place, else a contiguous copy."""
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    # The stride of a single row means nothing, but one that more rows would not have could mean another compilation.
    rows, columns = tensor.shape
    return tensor if rows > 1 or tensor.stride(0) >= columns else tensor.as_strided(tensor.shape, (columns, 1))


def no_grad_in_inference_mode():
    """A context for the call of an autograd Function. In inference mode nothing is recorded, even where gradients are
    enabled in it, but there a Function would try to, and raise. (torch.compile cannot ask.)"""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.no_grad() if inference else contextlib.nullcontext()


def savable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, those made in inference mode as copies: autograd saves none of these. (torch.compile takes none.)"""
    if torch.compiler.is_compiling():
        return tensors
    return tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


def device_of(tensor: torch.Tensor):
    """A context in which launches go to the tensor's device, which need not be the current one."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    # By its index: on the host of an H200 torch takes 1.2 us longer if it is given a torch.device.
    return getattr(torch, tensor.device.type).device(tensor.get_device())


def mark(terms: int, tensor: torch.Tensor) -> Optional[tuple]:
    """The point that the current stream has come to, if work of so many ``terms`` follows, enough to have other work
    `beside` it; else None."""
    if tensor.device.type == "cpu" or terms < _WORTH_A_STREAM:
        return None
    current = getattr(torch, tensor.device.type).current_stream()
    return current, current.record_event()


@contextlib.contextmanager
def beside(point: Optional[tuple]):
    """Launches in here need not wait for what the current stream has got since ``point``; what it gets next waits for
    them. Memory that is allocated in here belongs to another stream: it must not outlive the block."""
    if point is None:
        yield
        return
    current, event = point
    other = _other_stream(current)
    other.wait_event(event)
    try:
        with getattr(torch, current.device.type).stream(other):
            yield
    finally:
        current.wait_stream(other)


@functools.cache
def _other_stream(current):
    # One for each current stream, or those would wait for each other. Of high priority: its few programs do not queue
    # behind the many of a kernel that came first.
    return getattr(torch, current.device.type).Stream(current.device, priority=-1)


def select(
    indices: torch.Tensor, weight: torch.Tensor, vals: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selected rows of weight [B, K, D] and vals [B, K] for the torch references. As in the kernels, an index out
    of range is not followed and makes its val NaN."""
    F = weight.shape[0]
    poison = torch.where((indices >= 0) & (indices < F), 1.0, float("nan"))
    return weight.to(dtype)[indices.clamp(0, F - 1)], vals.to(dtype) * poison.to(dtype)


def new_empty(tensor: torch.Tensor, *shape: int, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """``tensor.new_empty``, but uninitialised also where deterministic algorithms make torch fill new memory with NaN:
    for memory of which every element is written before it is read, too large to be written twice."""
    dtype = dtype or tensor.dtype
    if not (torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory):
        return tensor.new_empty(shape, dtype=dtype)
    storage = torch.UntypedStorage(math.prod(shape) * dtype.itemsize, device=tensor.device)
    return tensor.new_empty(0, dtype=dtype).set_(storage, 0, shape)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv takes 1.5 us of the host's time, several times a launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def tile_columns(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """Columns of a forward tile: 256 bytes of a row of weight, and 32 columns where float64 doubles the registers.

    All samples walk the same columns of weight (grid: sample fastest), which must stay in the L2 cache: on an H200 at
    F=65536 a gather runs at 9.0 TB/s with 64 columns of float32, at 8.0 with 128 and at 5.9 with 256. Narrower tiles
    spend their instructions on indices.
    """
    columns = 32 if dtype == torch.float64 else 256 // weight.element_size()
    return min(columns, next_power_of_2(weight.shape[1]))


def lane_columns(weight: torch.Tensor, columns: int) -> int:
    """Columns that each of the 32 lanes of a warp reads of a row of weight at a time, so that all lanes lie along these
    ``columns``; fewer where rows do not start or end at multiples of so many.

    Steps then lie inside a thread, and sums and scans over them need no shuffle. Kernels that take it do not specialise
    the stride of weight: it alone tells the compiler how wide accesses may be. D they make a multiple of it. On an H200
    (B=4096, K=64, F=65536, D=2312) a step of the hierarchical loss takes 1.90 ms, and 2.40 if the compiler does not
    know D to be one; in bfloat16 the forward pass 0.20 and 0.26.
    """
    return math.gcd(weight.shape[1], weight.stride(0), max(1, columns // 32))


def refuse_second_derivative(name: str) -> None:
    """Raise where autograd asks the backward pass for a graph of its own. (`once_differentiable` would drop a second
    derivative silently where ``grad_out`` needs no gradient, as in a gradient penalty.)"""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward or grad without create_graph=True")

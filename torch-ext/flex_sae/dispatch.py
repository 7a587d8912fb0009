"""Where a call runs, in which dtype it computes, and what autograd may ask of it."""

import contextlib
import functools
from typing import Optional

import torch
import triton

# triton.jit decides at import whether kernels are compiled or interpreted, so this is read at import too.
INTERPRETED = triton.knobs.runtime.interpret


def runs_triton(indices: torch.Tensor) -> bool:
    """True on a GPU or in Triton's interpreter. Everything else, and an empty batch, goes to the torch references."""
    return (INTERPRETED or indices.is_cuda or indices.is_xpu) and indices.numel() > 0


def needs_gradients(*tensors: Optional[torch.Tensor]) -> bool:
    """Whether autograd records a call with these tensors. Inference mode records nothing, even where gradients are
    enabled in it. (torch.compile cannot trace this query.)"""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return False
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def compute_dtype(*tensors: Optional[torch.Tensor]) -> torch.dtype:
    """The dtype of all sums: float64 if any of the tensors is float64, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def promoted_dtype(*tensors: Optional[torch.Tensor]) -> torch.dtype:
    """The dtype that holds those of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


def linear_dtype(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.dtype:
    """The dtype of ``x @ weight.T + bias``: that of autocast, which leaves float64 alone, or the promoted one."""
    dtype = promoted_dtype(x, weight, bias)
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def device_of(tensor: torch.Tensor):
    """A context in which launches go to the tensor's device, which need not be the current one."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.get_device())


def refuse_second_derivative(name: str) -> None:
    """Raise where autograd asks a backward pass for a graph of its own. (`once_differentiable` would silently drop the
    second derivative of a gradient penalty, where ``grad_out`` is a constant.)"""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward or grad without create_graph=True")

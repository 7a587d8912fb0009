"""What the losses accept. Every mistake is named before anything is launched."""

import os
import warnings

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Programs and pairs are counted in int32, and Triton silently skips a launch whose grid overflows. 2**21 leaves room
# for steps past the last one and for the chunks of heavy features.
_MAX_PROGRAMS = 2**31 - 2**21
# CUDA allows 65535 programs in the second dimension of a grid: column tiles, of 32 columns at least.
_MAX_D = 2**20


def check_inputs(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    ordered: bool = False,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the five tensors fit together.

    With ``FLEX_SAE_CHECK_INDICES=1`` in the environment it also reads the values, at the cost of a device
    synchronisation: it raises IndexError at the first index outside ``[0, F)``, and warns of vals that do not descend
    where their order matters (``ordered``).
    """
    tensors = {"indices": indices, "weight": weight, "vals": vals, "bias": bias, "target": target}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            hint = "; pass its .weight.t()" if name == "weight" and isinstance(tensor, torch.nn.Linear) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
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
    _check_shapes(**tensors)
    if os.environ.get("FLEX_SAE_CHECK_INDICES", "").lower() in ("1", "true", "yes"):
        _check_values(indices, vals, len(weight), ordered)


def _check_shapes(indices, weight, vals, bias, target):
    for name, tensor, dims in (("indices", indices, "[B, K]"), ("weight", weight, "[F, D]")):
        if tensor.dim() != 2:
            hint = ": flatten leading dimensions" if tensor.dim() > 2 and name == "indices" else ""
            raise ValueError(f"{name} must have shape {dims}, got {tuple(tensor.shape)}{hint}")
    (B, K), (F, D) = indices.shape, weight.shape
    if F == 0 or D == 0:
        raise ValueError(f"weight must have shape [F, D] with F >= 1 and D >= 1, got {(F, D)}")
    if F != D and bias.shape == (F,) and target.shape == (B, F):
        raise ValueError(
            f"weight must have shape [F, D], got {(F, D)}, which is [D, F] for these bias and target: pass weight.t()"
        )
    for name, tensor, dims, shape in (
        ("vals", vals, "[B, K]", (B, K)),
        ("bias", bias, "[D]", (D,)),
        ("target", target, "[B, D]", (B, D)),
    ):
        if tensor.shape != shape:
            hint = ": flatten leading dimensions" if tensor.dim() > 2 else ""
            raise ValueError(f"{name} must have shape {dims} = {shape}, got {tuple(tensor.shape)}{hint}")
    tiles = -(-D // 32)
    if max(B * K, B * tiles, F * tiles) > _MAX_PROGRAMS or D > _MAX_D:
        raise ValueError(
            "sizes must satisfy B * K, B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, "
            f"got B={B}, K={K}, F={F}, D={D}"
        )


def _check_values(indices, vals, F, ordered):
    bad = ((indices < 0) | (indices >= F)).nonzero()
    if len(bad):
        b, k = bad[0].tolist()
        raise IndexError(f"indices must lie in [0, F) = [0, {F}), got {indices[b, k].item()} at [{b}, {k}]")
    if ordered and (vals[:, 1:] > vals[:, :-1]).any():
        warnings.warn(
            "vals do not descend along their rows: the hierarchical loss takes column 0 for the most important "
            "feature, the order of torch.topk(..., sorted=True)",
            stacklevel=4,
        )

"""What the functions accept. Every mistake is named before anything is launched."""

import os
import warnings
from typing import Optional

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
    sample_weight: Optional[torch.Tensor] = None,  # [B]
    ordered: bool = False,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the arguments of a loss fit together.

    With ``FLEX_SAE_CHECK_INDICES=1`` in the environment it also reads the values, at the cost of a device
    synchronisation: it raises IndexError at the first index outside ``[0, F)``, and warns of vals that do not descend
    where their order matters (``ordered``).
    """
    tensors = {"indices": indices, "weight": weight, "vals": vals, "bias": bias, "target": target}
    given = {} if sample_weight is None else {"sample_weight": sample_weight}
    _check_tensors({**tensors, **given}, "pass its .weight.t()")
    _check_shapes(**tensors)
    if sample_weight is not None:
        if sample_weight.shape != (len(indices),):
            expected = f"[B] = {(len(indices),)}"
            raise ValueError(f"sample_weight must have shape {expected}, got {tuple(sample_weight.shape)}")
        if sample_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("sample_weight must not require a gradient, for it gets none: detach it")
    if _checks_values():
        _check_indices(indices, len(weight))
        if ordered and (vals[:, 1:] > vals[:, :-1]).any():
            warnings.warn(
                "vals do not descend along their rows: the hierarchical loss takes column 0 for the most important "
                "feature, the order of torch.topk(..., sorted=True)",
                stacklevel=3,
            )


def check_nested_inputs(
    indices: torch.Tensor,  # [B, K]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # [B, K]
    bias: torch.Tensor,  # [D]
    target: torch.Tensor,  # [B, D]
    ends: torch.Tensor,  # [L], or [B, L]
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the arguments of the nested loss fit together, and
    with ``FLEX_SAE_CHECK_INDICES=1`` IndexError where an index or an end is out of range."""
    tensors = {"indices": indices, "weight": weight, "vals": vals, "bias": bias, "target": target}
    _check_tensors({**tensors, "ends": ends}, "pass its .weight.t()")
    _check_shapes(**tensors)
    B, K = indices.shape
    if ends.dim() not in (1, 2) or ends.shape[-1] == 0 or (ends.dim() == 2 and len(ends) != B):
        raise ValueError(f"ends must have shape [L] or [B, L] = ({B}, L) with L >= 1, got {tuple(ends.shape)}")
    F, D = weight.shape
    _check_sizes("B * L", B * ends.shape[-1], B=B, L=ends.shape[-1], F=F, D=D)
    if _checks_values():
        _check_indices(indices, F)
        steps = ends.diff(dim=-1, prepend=ends.new_zeros(*ends.shape[:-1], 1))
        bad = ((steps < 0) | (ends > K)).nonzero()
        if len(bad):
            place = bad[0].tolist()
            value = ends[tuple(place)].item()
            raise IndexError(f"ends must not descend and must lie in [0, K] = [0, {K}], got {value} at {place}")


def check_encode_inputs(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    k: int,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the arguments of the encoder fit together."""
    _check_encoder(x, weight, bias)
    F = len(weight)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= F:
        raise ValueError(f"k must be in [1, F] = [1, {F}], got {k}")
    _check_sizes("B * k", len(x) * k, B=len(x), k=k, F=F, D=x.shape[1])


def check_sparse_encode_inputs(
    x: torch.Tensor,  # [B, D]
    weight: torch.Tensor,  # [F, D]
    bias: Optional[torch.Tensor],  # [F]
    indices: torch.Tensor,  # [B, K], or [P]
    offsets: Optional[torch.Tensor],  # [B + 1]
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the arguments of the sparse encoder fit together, and
    with ``FLEX_SAE_CHECK_INDICES=1`` IndexError where an index or offset is out of range."""
    _check_encoder(x, weight, bias, indices=indices, **({} if offsets is None else {"offsets": offsets}))
    B, (F, D) = len(x), weight.shape
    if offsets is None:
        if indices.dim() != 2 or len(indices) != B:
            hint = ": flatten leading dimensions" if indices.dim() > 2 else ""
            raise ValueError(f"indices must have shape [B, K] = ({B}, K), got {tuple(indices.shape)}{hint}")
        _check_sizes("B * K", indices.numel(), B=B, K=indices.shape[1], F=F, D=D)
    else:
        if indices.dim() != 1:
            raise ValueError(f"indices must have shape [P] where there are offsets, got {tuple(indices.shape)}")
        if offsets.shape != (B + 1,):
            raise ValueError(f"offsets must have shape [B + 1] = {(B + 1,)}, got {tuple(offsets.shape)}")
        _check_sizes("P", len(indices), B=B, P=len(indices), F=F, D=D)
    _check_pairs(indices, offsets, F)


def check_decode_inputs(
    indices: torch.Tensor,  # [B, K], or [P]
    weight: torch.Tensor,  # [F, D]
    vals: torch.Tensor,  # as indices
    bias: Optional[torch.Tensor],  # [D]
    offsets: Optional[torch.Tensor],  # [B + 1]
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the arguments of the decode fit together, and with
    ``FLEX_SAE_CHECK_INDICES=1`` IndexError where an index or offset is out of range."""
    optional = {"bias": bias, "offsets": offsets}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_tensors({"indices": indices, "weight": weight, "vals": vals, **given}, "pass its .weight.t()")
    F, D = _checked_shape(weight)
    if offsets is None and indices.dim() != 2:
        hint = ": flatten leading dimensions" if indices.dim() > 2 else ""
        raise ValueError(f"indices must have shape [B, K], got {tuple(indices.shape)}{hint}")
    if offsets is not None and indices.dim() != 1:
        raise ValueError(f"indices must have shape [P] where there are offsets, got {tuple(indices.shape)}")
    if offsets is not None and (offsets.dim() != 1 or len(offsets) == 0):
        raise ValueError(f"offsets must have shape [B + 1], got {tuple(offsets.shape)}")
    if vals.shape != indices.shape:
        raise ValueError(f"vals must have the shape of indices, {tuple(indices.shape)}, got {tuple(vals.shape)}")
    if bias is not None and bias.shape != (D,):
        hint = f", and weight {(F, D)}: pass weight.t()" if bias.shape == (F,) else ""
        raise ValueError(f"bias must have shape [D] = {(D,)}, got {tuple(bias.shape)}{hint}")
    if offsets is None:
        B, K = indices.shape
        _check_sizes("B * K", B * K, B=B, K=K, F=F, D=D)
    else:
        _check_sizes("P", len(indices), B=len(offsets) - 1, P=len(indices), F=F, D=D)
    _check_pairs(indices, offsets, F)


def _check_encoder(x, weight, bias, **others):
    """x, weight and bias, and of the others all but their shapes."""
    tensors = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    _check_tensors({**tensors, **others}, "pass its .weight")
    F, D = _checked_shape(weight)
    if x.dim() != 2 or x.shape[1] != D:
        hint = ": flatten leading dimensions" if x.dim() > 2 else ""
        if x.dim() == 2 and x.shape[1] == F:
            hint = f", and weight {(F, D)}: pass weight.t()"
        raise ValueError(f"x must have shape [B, D] = (B, {D}), got {tuple(x.shape)}{hint}")
    if bias is not None and bias.shape != (F,):
        raise ValueError(f"bias must have shape [F] = {(F,)}, got {tuple(bias.shape)}")


def _checked_shape(weight):
    """F and D."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must have shape [F, D] with F >= 1 and D >= 1, got {tuple(weight.shape)}")
    return weight.shape


def _check_tensors(tensors, hint=""):
    """Type, device, layout and dtype. ``hint`` is for a Linear in place of its weight."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            advice = f"; {hint}" if hint and name == "weight" and isinstance(tensor, torch.nn.Linear) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{advice}")
    device = tensors["weight"].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of weight, {device}, got {tensor.device}")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "a nested tensor" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be dense (torch.strided), got {layout}")
        if name in ("indices", "offsets", "ends"):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


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
    _check_sizes("B * K", B * K, B=B, K=K, F=F, D=D)


def _check_sizes(name, pairs, **sizes):
    """``name`` is what ``pairs`` are."""
    B, F, D = (sizes[axis] for axis in "BFD")
    tiles = -(-D // 32)
    if max(pairs, B * tiles, F * tiles) > _MAX_PROGRAMS or D > _MAX_D:
        raise ValueError(
            f"sizes must satisfy {name}, B * ceil(D / 32), F * ceil(D / 32) <= 2**31 - 2**21 and D <= 2**20, "
            f"got {', '.join(f'{axis}={size}' for axis, size in sizes.items())}"
        )


def _checks_values():
    return os.environ.get("FLEX_SAE_CHECK_INDICES", "").lower() in ("1", "true", "yes")


def _check_indices(indices, F):
    bad = ((indices < 0) | (indices >= F)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise IndexError(f"indices must lie in [0, F) = [0, {F}), got {indices[tuple(place)].item()} at {place}")


def _check_pairs(indices, offsets, F):
    """The values of indices and offsets, on request."""
    if not _checks_values():
        return
    if offsets is not None:
        _check_offsets(indices, offsets)
        indices = indices[: offsets[-1]]
    _check_indices(indices, F)


def _check_offsets(indices, offsets):
    if offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] > len(indices):
        raise IndexError(f"offsets must ascend from 0 to at most P = {len(indices)}, got {offsets.tolist()}")

"""The (sample, step) pairs of a batch, ordered by feature."""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from .launch import cached_launch
from .tiles import cdiv

# Pairs of a program, four warps. On an H200 (B=4096, K=128) 256 take 7 us, 1024 take 10.
_BLOCK_P = 256
# Up to this many features the sort takes 16-bit keys, half the passes of 32 bits: a TopK step of D=768, F=24576 is 10%
# shorter.
_MAX_SHORT_KEYS = tl.constexpr(2**16)


class OrderedPairs(NamedTuple):
    """P pairs ordered by feature, those of one feature by their place in ``indices.flatten()``."""

    order: torch.Tensor  # [P] int64, places in indices.flatten()
    features: torch.Tensor  # [P] int32
    coefs: torch.Tensor  # [P], vals, times the scales of their samples if there are any; NaN for an index out of range
    samples: Optional[torch.Tensor]  # [P] int32
    slots: Optional[torch.Tensor]  # [B, K] int32, the inverse of order
    segments: torch.Tensor  # [F, 2] int32, where a feature's pairs start and end; zeros if it has none
    spare: Optional[torch.Tensor] = None  # [P] bool, which pairs are spare room, in the order of indices


@cached_launch
@triton.jit(do_not_specialize=["B", "P", "F"])
def _gather_pairs_kernel(
    features_ptr,  # [P]
    coefs_ptr,  # [P]
    samples_ptr,  # [P], or None
    slots_ptr,  # [P], or None
    segments_ptr,  # [F, 2], zeros
    order_ptr,  # [P]
    indices_ptr,  # [P]
    vals_ptr,  # [P]
    row_scales_ptr,  # [B], or None
    pair_samples_ptr,  # [P], the sample of each pair, or None: K pairs for each
    offsets_ptr,  # [B + 1], or None
    B,
    P,
    K,
    F,
    BLOCK_P: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < P
    pair = tl.load(order_ptr + p, mask=exists, other=0)
    feature, in_range, counts = _load_feature(indices_ptr, pair, exists, offsets_ptr, B, F)
    tl.store(features_ptr + p, feature, mask=exists)
    coef = tl.load(vals_ptr + pair, mask=exists, other=0.0).to(coefs_ptr.dtype.element_ty)
    coef = tl.where(in_range, coef, float("nan"))
    if row_scales_ptr is not None:
        coef *= tl.load(row_scales_ptr + pair // K, mask=exists, other=0.0)
    tl.store(coefs_ptr + p, coef, mask=exists)
    if pair_samples_ptr is not None:
        tl.store(samples_ptr + p, tl.load(pair_samples_ptr + pair, mask=exists, other=0), mask=exists)
    elif samples_ptr is not None:
        tl.store(samples_ptr + p, pair // K, mask=exists)
    if slots_ptr is not None:
        tl.store(slots_ptr + pair, p, mask=exists)
    # Where one feature's pairs end and the next one's start
    has_next = p + 1 < P
    next_pair = tl.load(order_ptr + p + 1, mask=has_next, other=0)
    next_feature, _, next_counts = _load_feature(indices_ptr, next_pair, has_next, offsets_ptr, B, F)
    differs = (feature != next_feature) | (counts != next_counts)
    tl.store(segments_ptr + 2 * feature.to(tl.int64) + 1, p + 1, mask=counts & differs)
    tl.store(segments_ptr + 2 * next_feature.to(tl.int64), p + 1, mask=next_counts & differs)


@triton.jit
def _load_feature(indices_ptr, pair, exists, offsets_ptr, B, F):
    """The feature that a pair was sorted by; whether that is its index, as one out of range wraps or is clamped; and
    whether the pair belongs to its segment, as one in spare room does not."""
    index = tl.load(indices_ptr + pair, mask=exists, other=0)
    feature = tl.where(F <= _MAX_SHORT_KEYS, index & 0xFFFF, index).to(tl.int32)
    counts = exists
    if offsets_ptr is not None:
        counts = exists & (pair < tl.load(offsets_ptr + B))
    return tl.minimum(tl.maximum(feature, 0), F - 1), (index >= 0) & (index < F), counts


def samples_of(places: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The samples, int32, that the pairs at these places belong to; the last one for places in spare room."""
    # Only the boundaries between samples: what is found is a sample wherever a place lies.
    return torch.searchsorted(offsets[1:-1], places, right=True, out_int32=True)


def order_pairs(
    indices: torch.Tensor,  # [B, K], contiguous; with offsets [P]
    vals: torch.Tensor,  # as indices, contiguous
    F: int,
    dtype: torch.dtype,
    row_scales: Optional[torch.Tensor] = None,  # [B]
    with_slots: bool = False,
    offsets: Optional[torch.Tensor] = None,  # [B + 1], contiguous
    pair_samples: Optional[torch.Tensor] = None,  # as indices, contiguous
) -> OrderedPairs:
    """The pairs ordered by feature, with coefficients in ``dtype``, and with their samples or with slots.

    The sample of a pair is that of its row, unless ``pair_samples`` say otherwise. With ``offsets`` the pairs of sample
    b are ``offsets[b]:offsets[b + 1]``; others belong to no segment."""
    K, P = 1 if indices.dim() == 1 else indices.shape[1], indices.numel()
    spare = None
    if offsets is not None:
        places = torch.arange(P, dtype=offsets.dtype, device=offsets.device)
        pair_samples = samples_of(places, offsets)
        spare = places >= offsets[-1]
        indices = indices.masked_fill(spare, 0)  # behind the pairs of feature 0
    # `out` narrows without an int64 temporary. Truncated keys sort as the results of _load_feature do.
    short = _MAX_SHORT_KEYS.value >= F
    keys = indices.new_empty(P, dtype=torch.int16 if short else torch.int32)
    torch.sub(indices.view(P), 2**15 if short else 0, out=keys)
    order = torch.sort(keys, stable=True).indices
    pairs = OrderedPairs(
        order=order,
        features=indices.new_empty(P, dtype=torch.int32),
        coefs=vals.new_empty(P, dtype=dtype),
        samples=None if with_slots else indices.new_empty(P, dtype=torch.int32),
        slots=indices.new_empty(indices.shape, dtype=torch.int32) if with_slots else None,
        segments=indices.new_zeros(F, 2, dtype=torch.int32),
        spare=spare,
    )
    _gather_pairs_kernel[(cdiv(P, _BLOCK_P),)](
        pairs.features,
        pairs.coefs,
        pairs.samples,
        pairs.slots,
        pairs.segments,
        order,
        indices,
        vals,
        row_scales,
        pair_samples,
        offsets,
        0 if offsets is None else len(offsets) - 1,
        P,
        K,
        F,
        BLOCK_P=_BLOCK_P,
    )
    return pairs

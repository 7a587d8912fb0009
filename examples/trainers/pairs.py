"""Dense codes of a trainer as the pairs that `triton_sae_decode` and `triton_nested_sae_loss` take."""

import torch


def ragged_pairs(codes, P):
    """The nonzeros of dense codes: `triton_sae_decode(indices, weight, vals, bias, offsets=offsets)`.

    Args:
        codes: ``[B, F]``. Only nonzeros get a gradient, which is all that relu, TopK and BatchTopK pass on. A JumpReLU
            whose threshold learns passes one on to some zeros too.
        P: an upper bound on how many nonzeros there are, such as B * k. They are not counted first, so that nothing
            waits for the GPU; if there are more, all vals are NaN.

    Returns:
        indices ``[P]``, vals ``[P]``, differentiable in codes, and offsets ``[B + 1]``: the pairs of sample b are
        ``offsets[b]:offsets[b + 1]``, in the order of features; from ``offsets[B]`` on there is spare room.
    """
    (B, F), flat = codes.shape, codes.reshape(-1)
    # One more than P, to see whether there are more. Behind the nonzeros follows the end of codes.
    places = torch.nonzero_static(flat.detach() != 0, size=P + 1, fill_value=B * F)[:, 0]
    too_many, places = places[-1] < B * F, places[:-1]
    offsets = torch.searchsorted(places, torch.arange(0, (B + 1) * F, F, device=codes.device))
    vals = flat.gather(0, places.clamp(max=B * F - 1)).masked_fill(too_many, float("nan"))
    return places % F, vals, offsets


def nested_pairs(codes, K, widths):
    """Rows of K codes with all nonzeros: `triton_nested_sae_loss(indices, weight, vals, bias, x, ends)`.

    Args:
        codes: ``[B, F]``, as for `ragged_pairs`.
        K: an upper bound on the nonzeros of a row, itself at most F. A row that has more gets vals of NaN.
        widths: ``[L]`` int64 on the device of codes, ascending: level l of a Matryoshka SAE is of the first widths[l]
            features.

    Returns:
        indices ``[B, K]``, ascending in each row, and vals ``[B, K]``, differentiable in codes: the nonzeros and, where
        a row has fewer, some zeros; ends ``[B, L]``, how many of them are of each level.
    """
    indices = codes.detach().abs().topk(K, dim=1, sorted=False).indices.sort(dim=1).values
    too_many = (codes.detach() != 0).sum(1, keepdim=True) > K
    ends = torch.searchsorted(indices, widths.expand(len(codes), -1).contiguous())
    return indices, codes.gather(1, indices).masked_fill(too_many, float("nan")), ends

"""The nested losses as docs/trainers.md has them, against dense autograd in float64."""

import re
from pathlib import Path

import pytest
import torch
from support import allowed_error, needs_cuda, record_compilations

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "trainers.md").read_text()
SECTION = re.search(r"^## Nested losses\n(.*?)^## ", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
BOUNDARIES, MATRYOSHKA, RANDOM, BUDGETS, MULTI_TOPK, EXPLAINED = re.findall(
    r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL
)

B, K, F, D = 6, 8, 24, 10
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make_names(flex, device, dtype=torch.float32):
    """The quickstart's names. Row 0 has vals of zero behind its third."""
    generator = torch.Generator().manual_seed(0)
    x, decoder, bias, vals = (torch.randn(*shape, generator=generator) for shape in ((B, D), (F, D), (D,), (B, K)))
    vals = vals.abs().sort(dim=1, descending=True).values
    vals[0, 3:] = 0
    indices = torch.rand(B, F, generator=generator).topk(K, dim=1).indices.to(device)
    x, decoder, bias, vals = (tensor.to(device, dtype) for tensor in (x, decoder, bias, vals))
    leaves = {"decoder": decoder, "vals": vals, "bias": bias}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return dict(torch=torch, flex=flex, device=device, B=B, K=K, F=F, D=D, x=x, indices=indices, **leaves)


def run(code, names):
    """The names after the code, which finds and leaves `names` as they are."""
    names = dict(names)
    exec(code, names)
    return names


def dense_losses(names, decoder, vals, bias, boundaries=None, budgets=None):
    """The losses of the features below each boundary, or of the first columns, from [B, F] codes in float64."""
    x, indices = names["x"].double(), names["indices"]
    losses = []
    for end in budgets or boundaries:
        codes = torch.zeros(B, F, dtype=torch.float64, device=x.device)
        codes = codes.scatter(1, indices[:, :end], vals[:, :end]) if budgets else codes.scatter(1, indices, vals)
        below = F if budgets else end
        losses.append((codes[:, :below] @ decoder[:below] + bias - x).square().mean())
    return torch.stack(losses)


def assert_close(value, expected, dtype):
    """Within the roundings of reconstructions, their gradients and sums over samples and levels, each of terms no
    larger than the largest element."""
    assert value.shape == expected.shape and value.dtype == dtype
    tolerance = allowed_error(2 * D + 2 * K + B * D, dtype, expected.abs().max(), expected, dtype)
    assert ((value.double() - expected).abs() <= tolerance).all()


def assert_is_dense(code, names, level_weights, **levels):
    """The code's loss and its gradients are those of the weighted sum of dense losses."""
    dtype, leaves = names["x"].dtype, [names[name] for name in ("decoder", "vals", "bias")]
    loss = run(code, names)["loss"]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    losses = dense_losses(names, *exact, **levels)
    true = losses @ torch.tensor(level_weights, dtype=torch.float64, device=losses.device)
    got = loss, *torch.autograd.grad(loss, leaves)
    for value, expected in zip(got, (true, *torch.autograd.grad(true, exact)), strict=True):
        assert_close(value, expected, dtype)


@dtypes
def test_matryoshka_is_the_sum_over_prefixes_of_the_dictionary(flex, device, dtype):
    names = make_names(flex, device, dtype)
    assert_is_dense(BOUNDARIES + MATRYOSHKA, names, [1.0] * 4, boundaries=[3, 6, 12, 24])


@dtypes
def test_matryoshka_levels_can_be_weighted(flex, device, dtype):
    names = make_names(flex, device, dtype)
    level_weights = [0.5, 2.0, 0.0, 1.0]
    names["level_weights"] = torch.tensor(level_weights, dtype=dtype, device=device)
    weighted = re.sub(r"losses\.sum\(\)  # or ", "", MATRYOSHKA)
    assert weighted != MATRYOSHKA
    assert_is_dense(BOUNDARIES + weighted, names, level_weights, boundaries=[3, 6, 12, 24])


def test_boundaries_may_be_equal_zero_or_beyond_f(flex, device):
    names = make_names(flex, device)
    names["boundaries"] = torch.tensor([0, 7, 7, F + 3], device=device)
    assert_is_dense(MATRYOSHKA, names, [1.0] * 4, boundaries=[0, 7, 7, F])


def test_features_beyond_the_last_boundary_have_no_gradient(flex, device):
    names = make_names(flex, device)
    names["boundaries"] = torch.tensor([3, 12], device=device)
    d_decoder, d_vals = torch.autograd.grad(run(MATRYOSHKA, names)["loss"], (names["decoder"], names["vals"]))
    beyond = names["indices"] >= 12
    assert (d_decoder[12:] == 0).all() and (d_vals[beyond] == 0).all()
    assert (d_decoder[:12] != 0).any() and (d_vals[~beyond] != 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_random_prefixes_end_with_the_whole_dictionary(flex, device, seed):
    names = make_names(flex, device)
    torch.manual_seed(seed)
    names["boundaries"] = run(RANDOM, names)["boundaries"]
    boundaries = names["boundaries"].tolist()
    assert boundaries == sorted(boundaries) and boundaries[0] >= 1 and boundaries[-2] < boundaries[-1] == F
    assert boundaries != run(RANDOM, names)["boundaries"].tolist()
    assert_is_dense(MATRYOSHKA, names, [1.0] * 5, boundaries=boundaries)


@needs_cuda
def test_random_prefixes_neither_synchronise_nor_recompile(flex, device, monkeypatch):
    names = make_names(flex, device)
    run(RANDOM + MATRYOSHKA, names)["loss"].backward()
    compiled = record_compilations(monkeypatch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(RANDOM + MATRYOSHKA, names)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled


@dtypes
def test_budgets_are_the_mean_over_prefixes_of_the_columns(flex, device, dtype):
    assert_is_dense(BUDGETS, make_names(flex, device, dtype), [1 / 3] * 3, budgets=[2, 4, 8])


def test_all_budgets_are_the_hierarchical_loss(flex, device):
    names = make_names(flex, device)
    every = re.sub(r"\[K // 4, K // 2, K\]", "list(range(1, K + 1))", BUDGETS)
    hierarchical = "loss = flex.triton_hierarchical_sae_loss(indices, decoder, vals, bias, x)"
    for code in (every, hierarchical):
        assert_is_dense(code, names, [1 / K] * K, budgets=range(1, K + 1))


@dtypes
def test_multi_topk_adds_an_eighth_of_the_larger_budget(flex, device, dtype):
    assert_is_dense(MULTI_TOPK, make_names(flex, device, dtype), [1, 1 / 8], budgets=[2, 8])


@dtypes
def test_explained_variances_are_those_of_each_budget(flex, device, dtype):
    names = make_names(flex, device, dtype)
    budgets = list(range(K + 1))
    names["budgets"] = torch.tensor(budgets, device=device)
    explained = run(EXPLAINED, names)["explained_variances"]
    assert not explained.requires_grad
    exact = [names[name].detach().double() for name in ("decoder", "vals", "bias")]
    variance = (names["x"].double() - names["x"].double().mean(0)).square().mean()
    assert_close(explained, 1 - dense_losses(names, *exact, budgets=budgets) / variance, dtype)


def test_an_end_above_k_spoils_its_loss_and_those_behind_it(flex, device):
    names = make_names(flex, device)
    names["budgets"] = torch.tensor([1, K + 1, K], device=device)
    assert run(EXPLAINED, names)["losses"].isnan().tolist() == [False, True, True]


def test_vals_of_zero_may_stand_at_any_feature(flex, device):
    names = make_names(flex, device)
    other = dict(names, indices=names["indices"].clone())
    other["indices"][0, 3:] = names["indices"][0, 0]  # a feature that the row has
    results = []
    for case in (names, other):
        loss = run(BOUNDARIES + MATRYOSHKA, case)["loss"]
        results.append((loss.detach(), *torch.autograd.grad(loss, (case["decoder"], case["bias"]))))
    for value, expected in zip(*results, strict=True):
        assert_close(value, expected.double(), torch.float32)

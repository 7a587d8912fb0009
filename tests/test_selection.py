"""The k largest of each row are those of torch's stable descending sort, bit for bit."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import INTERPRETED, needs_cuda, submodule

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")

VALUES = {
    "random": lambda shape, generator: torch.randn(shape, generator=generator, dtype=f64),
    "few values": lambda shape, generator: torch.randint(-2, 3, shape, generator=generator).double() / 2,
    "all equal": lambda shape, generator: torch.full(shape, -0.5, dtype=f64),
    "all negative": lambda shape, generator: -torch.rand(shape, generator=generator, dtype=f64) - 0.1,
    "both zeros": lambda shape, generator: torch.randint(0, 2, shape, generator=generator).double() * -0.0,
    "specials": lambda shape, generator: torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7], dtype=f64)[
        torch.randint(9, shape, generator=generator)
    ].copysign(torch.randn(shape, generator=generator)),
}


def assert_selected(flex, x, k, relu):
    vals, indices = x.new_full((len(x), k), NAN), x.new_full((len(x), k), -1, dtype=torch.int64)
    submodule(flex, "selection").select_largest(x, vals, indices, relu)
    # On a CPU, where a NaN of either sign is the largest
    expected = x.cpu().sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices.cpu(), expected.indices[:, :k])
    true = expected.values[:, :k].relu() if relu else expected.values[:, :k]
    torch.testing.assert_close(vals.cpu(), true, rtol=0, atol=0, equal_nan=True)
    return vals, indices


# Groups of 32 elements do not start with the rows, and the last sizes take more than one block of them.
DICTIONARIES = (1, 2, 31, 32, 33, 100, 193) if INTERPRETED else (1, 2, 31, 32, 33, 100, 193, 2047, 4097, 70001)


@hypothesis.settings(phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate], max_examples=120)
@hypothesis.given(
    R=st.sampled_from([1, 2, 3]),
    F=st.sampled_from(DICTIONARIES),
    share=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    values=st.sampled_from([*VALUES]),
    dtype=st.sampled_from([f32, f64, f16, bf16]),
    relu=st.booleans(),
    fast=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_k_largest_are_those_of_a_stable_sort(flex, device, R, F, share, values, dtype, relu, fast, seed):
    selection, generator = submodule(flex, "selection"), torch.Generator().manual_seed(seed)
    k = max(1, min(round(share * F), selection._MAX_K if fast else F))
    x = VALUES[values]((R, F), generator).to(device, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setattr(selection, "_MAX_K", 0)
            x = x + 0 if dtype in (f32, f64) else x  # no -0.0, like pre-activations
        assert_selected(flex, x, k, relu)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("k", [1, 2, 3, 40])
def test_k_may_be_beyond_the_fast_range(flex, device, monkeypatch, k, values):
    monkeypatch.setattr(submodule(flex, "selection"), "_MAX_K", 2)
    x = VALUES[values]((3, 40), torch.Generator().manual_seed(k)).float().to(device)
    assert_selected(flex, x, k, relu=False)


def test_a_maximum_may_lie_in_any_place(flex, device):
    x = torch.eye(70, device=device)
    vals, indices = assert_selected(flex, x, 1, relu=True)
    assert torch.equal(indices[:, 0], x.argmax(1)) and vals.eq(1).all()


@needs_cuda
@pytest.mark.parametrize("values", ["random", "few values", "specials"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("k", [1, 32, 64, 200, 256, 257, 1000])
@pytest.mark.parametrize("R, F", [(16, 1009), (100, 24576), (3, 65537), (16, 200001)])
def test_large_dictionaries_are_searched_exactly_and_repeatably(flex, R, F, k, dtype, values):
    x = VALUES[values]((R, F), torch.Generator().manual_seed(F + k)).to("cuda", dtype)
    x = x + 0 if dtype == f32 else x  # as in pre-activations, no -0.0
    first, second = (assert_selected(flex, x, k, relu=False) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)

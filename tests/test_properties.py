"""Loss and every gradient against float64, over sizes, dtypes, layouts and index patterns."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    PATTERNS,
    WIDTHS,
    assert_right,
    check,
    errors_over_budget,
    laid_out,
    make_problem,
    needs_cuda,
    pairs_of,
    reference_loss,
    relative_error,
    run,
    submodule,
    triton_loss,
)
from truth import Problem, Result, truth

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# of weight, vals, bias, target
MIXES = [(f16, f32, f32, f32), (f32, f16, f64, f16), (f16, f16, f16, f32), (f64, f16, f32, f16), (f32, f32, f16, f64)]
if not INTERPRETED:
    MIXES += [(bf16, f32, f32, bf16), (f32, bf16, f16, bf16), (bf16, bf16, bf16, f32), (bf16, f64, f32, f16)]


# One, primes, powers of two and their neighbours: below, at and above the step tiles (4 to 32).
if INTERPRETED:
    BATCHES, STEPS, FEATURES = (1, 2, 3, 5), (1, 2, 5, 17, 33, 64), (1, 2, 7, 40)
else:
    BATCHES = (1, 2, 3, 13, 64, 257)
    STEPS = (1, 2, 3, 4, 5, 16, 31, 32, 33, 67, 128)
    FEATURES = (1, 2, 31, 256, 1009, 5000)


# No shrinking: a failing example is readable as it was drawn, and every smaller one costs a run or a compilation.
generate = hypothesis.settings(phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate])


@generate
@hypothesis.given(
    sizes=st.tuples(*map(st.sampled_from, (BATCHES, STEPS, FEATURES, WIDTHS))),
    pattern=st.sampled_from(PATTERNS),
    dtypes=st.sampled_from([*DTYPES, *MIXES]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    grad_out=st.sampled_from([1.0, 0.25, -3.0]),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_right_for_any_input(
    flex, device, kind, sizes, pattern, dtypes, index_dtype, layouts, grad_out, deterministic, seed
):
    problem = make_problem(*sizes, device=device, pattern=pattern, dtypes=dtypes, index_dtype=index_dtype, seed=seed)
    check(flex, kind, Problem(*map(laid_out, problem, layouts)), grad_out, deterministic)


def heavy_examples(test):
    for counts in (
        [320],
        [257, 1, 700, 3, 256, 0, 255, 258],
        [0] * 20 + [513] + [0] * 20,
        [256, 127, 1, 128, 128],  # heavy features end where chunks do
        [129, 127, 128, 0, 256],  # and start where they do
    ):
        for deterministic in (False, True):
            test = hypothesis.example(counts=counts, K=20, D=3, dtypes=f32, deterministic=deterministic, seed=0)(test)
    return test


# Features of more than 128 pairs are cut where chunks end, and have replicas from 256 pairs on.
@heavy_examples
@generate
@hypothesis.given(
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 127, 128, 129, 255, 256, 257, 300, 520]), min_size=1, max_size=3),
    K=st.sampled_from([8, 20, 33]),
    D=st.sampled_from(WIDTHS[:3] if INTERPRETED else WIDTHS),
    dtypes=st.sampled_from(DTYPES),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_heavy_features_are_right_in_any_company(flex, device, kind, counts, K, D, dtypes, deterministic, seed):
    hypothesis.assume(any(counts))
    indices = pairs_of(counts, K, device, seed)
    problem = make_problem(len(indices), K, len(counts), D, device=device, dtypes=dtypes, seed=seed)
    check(flex, kind, problem._replace(indices=indices), deterministic=deterministic)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (3, 5, 7, 2), (2, 17, 3, 33), (1, 16, 40, 512), (2, 1, 2, 1031), (5, 3, 9, 513), (1, 33, 64, 31)],
    ids=str,
)
def test_sizes_need_not_be_round(flex, device, kind, sizes):
    check(flex, kind, make_problem(*sizes, device=device))


# Each mix is a compilation of every kernel: the pure dtypes are enough for the quick subset. One feature is heavy.
@pytest.mark.parametrize("dtypes", [*(pytest.param(d, marks=pytest.mark.kernels_ci) for d in DTYPES), *MIXES], ids=str)
def test_every_dtype_and_mix_accumulates_wide_and_rounds_once(flex, device, kind, dtypes):
    check(flex, kind, make_problem(30, 17, 12, 33, device=device, dtypes=dtypes, pattern="one_hot_feature"))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_duplicate_indices_add_up_in_every_pattern(flex, device, kind, pattern, index_dtype):
    check(flex, kind, make_problem(6, 7, 10, 33, device=device, pattern=pattern, index_dtype=index_dtype))


# The transposed weight is that of a linear decoder, [D, F].
@pytest.mark.parametrize("name", Problem._fields)
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "expanded"])
def test_every_input_may_be_strided(flex, device, kind, name, layout):
    problem = make_problem(3, 5, 9, 33, device=device)
    tensor = getattr(problem, name)
    tensor = tensor[:1].expand(tensor.shape) if layout == "expanded" else laid_out(tensor, layout)
    check(flex, kind, problem._replace(**{name: tensor}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_tiny_and_zero_vals_are_right(flex, device, kind, dtype):
    # The squares of float32 vals stay below its maximum; float16 gradients overflow where the truth does.
    exponent = {f16: 10, f64: 400}.get(dtype, 40)
    for scale in (2.0**exponent, 2.0**-exponent, 0.0):
        check(flex, kind, make_problem(3, 4, 9, 33, device=device, dtypes=dtype, scale=scale))


# D that fills its tiles and D that does not: infinity times the zeros past the last column is NaN.
@pytest.mark.parametrize("D", [64, 127])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_an_infinite_val_gives_what_the_reference_gives(flex, device, kind, D):
    problem = make_problem(3, 4, 9, D, device=device)
    problem.vals[1, 2] = float("inf")
    result, expected = (run(loss(flex, kind), problem) for loss in (triton_loss, reference_loss))
    assert expected.loss.item() == float("inf")
    # d weight and d vals of the hierarchical loss are differences of infinite sums.
    for name in Result._fields if kind == "topk" else ("loss", "bias", "target"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)


def test_an_empty_batch_has_a_nan_loss_and_no_features_leave_the_bias(flex, device, kind):
    result = run(triton_loss(flex, kind), make_problem(0, 4, 9, 33, device=device))
    assert result.loss.isnan()
    assert all(not gradient.any() for gradient in result[1:])
    if kind == "topk":
        check(flex, kind, make_problem(3, 0, 9, 33, device=device))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtypes", [f32, f64, f16, bf16, *MIXES], ids=str)
def test_the_torch_references_are_right(flex, device, kind, dtypes):
    problem = make_problem(20, 17, 12, 33, device=device, dtypes=dtypes, pattern="one_hot_feature")
    assert_right(kind, problem, run(reference_loss(flex, kind), problem))


# What the tests above rest on: the truth, and a budget that is tight.


def test_the_truth_is_autograd_of_the_definition(kind):
    problem = make_problem(5, 6, 7, 8, device="cpu", dtypes=f64, pattern="duplicates")

    def definition(indices, weight, vals, bias, target):
        terms = vals[..., None] * weight[indices]
        prefixes = terms.sum(1, keepdim=True) if kind == "topk" else terms.cumsum(1)
        return (bias + prefixes - target[:, None]).square().mean()

    assert_right(kind, problem, run(definition, problem))


def flawed(flaw, kind, problem):
    """The truth, with a mistake that a kernel could make."""
    weight, vals = problem.weight, problem.vals.clone()
    if flaw == "a pair dropped":
        vals[1, -1] = 0
    elif flaw == "a duplicate lost":
        vals[1, 1] = 0
    elif flaw == "weight in 16 bits":
        weight = weight.half().to(weight.dtype)
    result = truth(kind, problem._replace(weight=weight, vals=vals))
    if flaw == "gradients through 16 bits":
        result = Result(result.loss, *(gradient.half() for gradient in result[1:]))
    elif flaw == "float64 through float32":
        result = Result(*(value.float() for value in result))
    return Result(*(value.to(weight.dtype) for value in result))


@pytest.mark.parametrize(
    "flaw",
    ["a pair dropped", "a duplicate lost", "weight in 16 bits", "gradients through 16 bits", "float64 through float32"],
)
def test_the_budget_has_no_room_for(kind, flaw):
    dtype = f64 if flaw == "float64 through float32" else f32
    problem = make_problem(64, 32, 100, 64, device="cpu", dtypes=dtype, pattern="duplicates")
    assert max(errors_over_budget(kind, problem, flawed(None, kind, problem))) <= 1
    broken = errors_over_budget(kind, problem, flawed(flaw, kind, problem))
    assert min(broken[1:]) > 1, f"{flaw} passes unseen: {broken}"


# Tiles of atomic additions have fewer columns where those of all features would leave the L2 cache.
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("sizes", [(9, 17, 12, 33), (40, 3, 7, 127), (8, 33, 2, 64)], ids=str)
def test_narrower_tiles_of_atomic_additions_are_right(flex, device, monkeypatch, sizes, dtype):
    monkeypatch.setattr(submodule(flex, "hierarchical_backward"), "_L2_BYTES", 0)
    check(flex, "hierarchical", make_problem(*sizes, device=device, dtypes=dtype, pattern="duplicates"))


# Real sizes


@needs_cuda
@pytest.mark.parametrize("sizes", [(4096, 32, 65536, 1031), (2048, 256, 131072, 512), (1000, 77, 16384, 513)], ids=str)
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_relative_error_at_real_sizes(flex, kind, sizes, dtype):
    problem = make_problem(*sizes, device="cuda", dtypes=dtype)
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    errors = {name: relative_error(*pair) for name, *pair in zip(result._fields, result, expected, strict=True)}
    for name, error in errors.items():
        # The suffix sums of 256 residuals err twice as much as a single one.
        long = kind == "hierarchical" and sizes[1] == 256 and name in ("vals", "weight")
        limit = 1e-12 if dtype == f64 else 1e-5 if long else 5e-6
        assert error <= limit, f"{name}: {error:.3g}, in all {errors}"


# The last sizes hold more pairs than 2048 chunks, or replicas, of 128 pairs: they take more.
@needs_cuda
@pytest.mark.parametrize("sizes", [(4096, 32, 65536, 512), (1999, 101, 5003, 200), (32768, 64, 16384, 127)], ids=str)
@pytest.mark.parametrize("pattern", ["all_same", "one_hot_feature"])
def test_a_feature_that_fires_everywhere_is_right_at_real_sizes(flex, kind, sizes, pattern):
    check(flex, kind, make_problem(*sizes, device="cuda", pattern=pattern))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
def test_16_bit_gradients_err_by_one_rounding(flex, device, kind, dtype):
    sizes = (24, 16, 20, 40) if INTERPRETED else (4096, 64, 65536, 512)
    problem = make_problem(*sizes, device=device, dtypes=dtype)
    grad_out = float(sizes[0] * sizes[3])  # keeps float16 gradients in its normal range, as loss scaling does
    result = run(triton_loss(flex, kind), problem, torch.tensor(grad_out, device=device))
    expected = truth(kind, problem, grad_out)
    for name in Problem._fields[1:]:
        value, true = getattr(result, name), getattr(expected, name)
        assert relative_error(value, true) <= 1.1 * relative_error(true.to(dtype), true), name

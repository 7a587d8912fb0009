"""Gradients summed in the order of the features: how the pairs are sorted, and the scratch of the hierarchical loss."""

import pytest
import torch
from support import (
    DTYPES,
    INTERPRETED,
    LOSSES,
    PATTERNS,
    assert_right,
    deterministic_algorithms,
    make_indices,
    make_problem,
    relative_error,
    result_dtypes,
    run,
    submodule,
    triton_loss,
)
from truth import Problem, Result, truth


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_how_pairs_are_ordered_changes_no_bit(flex, device, monkeypatch, kind, pattern):
    problem = make_problem(40, 17, 12, 5, device=device, pattern=pattern)
    module, results = submodule(flex, "pairs"), []
    for max_few, max_sort in ((680, 680), (679, 680), (0, 7)):  # counted; one sort; 97 of them and a rest
        monkeypatch.setattr(module, "_MAX_FEW", max_few)
        monkeypatch.setattr(module, "_MAX_SORT", max_sort)
        with deterministic_algorithms():
            results.append(run(triton_loss(flex, kind), problem))
    for other in results[1:]:
        for name, value, same in zip(other._fields, results[0], other, strict=True):
            assert torch.equal(value, same), name


@pytest.fixture(params=["counted", "sorted", "sorted in parts"])
def sizes(request, flex, monkeypatch):
    """B and K of a batch whose pairs are ordered in one of three ways."""
    counted = request.param == "counted"
    B, K = 20 if counted and INTERPRETED else 270, 30
    monkeypatch.setattr(submodule(flex, "pairs"), "_MAX_FEW", B * K if counted else 0)
    monkeypatch.setattr(submodule(flex, "pairs"), "_MAX_SORT", 1700 if request.param == "sorted in parts" else B * K)
    return B, K


# The keys of the sort are 16 bits wide up to 2**16 features.
@pytest.mark.parametrize("F", [1, 9, 2**15, 2**15 + 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pairs_are_ordered_by_feature_then_place(flex, device, sizes, F, index_dtype):
    module, (B, K) = submodule(flex, "pairs"), sizes
    generator = torch.Generator(device).manual_seed(0)
    indices = make_indices("one_hot_feature", B, K, F, generator).to(index_dtype)
    indices[0, :2] = torch.tensor([0, F - 1])
    vals, units = (torch.randn(shape, generator=generator, device=device) for shape in ((B, K), (B,)))
    features, order = indices.long().view(-1).sort(stable=True)
    counts = features.bincount(minlength=F)
    segments = torch.stack([counts.cumsum(0) - counts, counts.cumsum(0)], dim=1)
    for want_slots in (False, True):
        bias_pairs = 0 if want_slots else B
        pairs = module.new_pairs(indices, F, torch.float32, bias_pairs)
        module.sort_pairs(pairs, indices)
        module.gather_pairs(pairs, indices, vals, units, want_slots)
        assert torch.equal(pairs.order, order)
        keys = pairs.keys.long() + 2**15 if F <= 2**16 else pairs.keys.view(torch.int32).long()
        assert torch.equal(keys, features)
        assert torch.equal(pairs.segments.long(), torch.where(counts[:, None] > 0, segments, 0))
        coefs, link = pairs.coefs[: B * K], pairs.link.long()[: B * K]
        assert torch.equal(coefs, (vals * units[:, None]).view(-1)[order])
        assert torch.equal(link, order.argsort() if want_slots else order // K)
        assert torch.equal(pairs.coefs[B * K :], units[:bias_pairs])
        assert torch.equal(pairs.link.long()[B * K :], torch.arange(bias_pairs, device=device))


@pytest.mark.parametrize("F", [1, 9, 2**15 + 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_a_feature_out_of_range_is_ordered_with_one_in_range(flex, device, sizes, F, index_dtype):
    module, (B, K) = submodule(flex, "pairs"), sizes
    generator = torch.Generator(device).manual_seed(0)
    indices = make_indices("uniform", B, K, F, generator).to(index_dtype)
    bounds = torch.iinfo(index_dtype)
    bad = torch.tensor([-1, F, F + 5, 2**15, 2**16, 2**17 + 3, bounds.min, bounds.min + 2**15, bounds.max, -(2**16)])
    bad = bad[(bad < 0) | (bad >= F)].to(device, index_dtype)
    indices.view(-1)[: 3 * len(bad)] = bad.repeat(3)
    pairs = module.new_pairs(indices, F, torch.float32)
    module.sort_pairs(pairs, indices)
    module.gather_pairs(pairs, indices, torch.zeros(B, K, device=device), torch.empty(0, device=device), False)
    # Each pair is in one segment, and all in range are in their feature's.
    assert torch.equal(pairs.order.sort().values, torch.arange(B * K, device=device))
    starts, ends = pairs.segments.long().unbind(1)
    counts = ends - starts
    features = torch.arange(F, device=device).repeat_interleave(counts)
    assert len(features) == B * K
    assert torch.equal(starts[counts > 0], (counts.cumsum(0) - counts)[counts > 0])
    chosen = indices.view(-1)[pairs.order].long()
    in_range = (chosen >= 0) & (chosen < F)
    assert torch.equal(chosen[in_range], features[in_range])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("pattern", ["uniform", "one_hot_feature"])
def test_a_dictionary_far_larger_than_the_batch(flex, device, monkeypatch, kind, pattern):
    problem = make_problem(16, 33, 2200, 37, device=device, pattern=pattern)  # half of all pairs: a heavy feature
    with deterministic_algorithms():
        by_pair = run(triton_loss(flex, kind), problem)
        monkeypatch.setattr(submodule(flex, "pairs"), "_SPARSE", 5)
        by_feature = run(triton_loss(flex, kind), problem)
    assert_right(kind, problem, by_pair)
    for name, value, other in zip(by_pair._fields, by_pair, by_feature, strict=True):
        assert torch.equal(value, other), name


# Sums take tiles of 512 columns, and half a one for up to 256 that are left.
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "D, dtype",
    [*((513, dtype) for dtype in DTYPES), (768, torch.float32), (769, torch.float32)],
    ids=str,
)
def test_the_last_columns_may_fill_half_a_tile(flex, device, kind, D, dtype):
    problem = make_problem(17, 16, 3, D, device=device, dtypes=dtype, pattern="one_hot_feature")  # 136 pairs in one
    with deterministic_algorithms():
        assert_right(kind, problem, run(triton_loss(flex, kind), problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 7, 130), (20, 17, 3, 33), (1, 1, 1, 1)], ids=str)
def test_the_deterministic_path_is_right(flex, device, sizes, dtype):
    problem = make_problem(*sizes, device=device, dtypes=dtype, pattern="duplicates")
    with deterministic_algorithms():
        result = run(flex.triton_hierarchical_sae_loss, problem)
    assert_right("hierarchical", problem, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("weight", "vals"), ("weight",), ("vals",)], ids="+".join)
@pytest.mark.parametrize("tiles", [1, 2])
def test_scratch_for_some_of_the_columns_is_enough(flex, device, monkeypatch, tiles, names, dtype):
    itemsize = {torch.float64: 8, torch.bfloat16: 2}.get(dtype, 4)  # of scratch
    tile = 256 // itemsize
    # Two launches of `tiles` tiles and one of less; a feature of 272 pairs is heavy, the others are light.
    B, K, F, D = 16, 33, 6, (2 * tiles + 1) * tile - 5
    problem = make_problem(B, K, F, D, device=device, dtypes=dtype, pattern="one_hot_feature")
    exact = truth("hierarchical", problem)
    rounded = Result(*(value.to(dtype) for value, dtype in zip(exact, result_dtypes(problem), strict=True)))

    kernels = submodule(flex, "hierarchical_kernels")
    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", K * tiles * tile * itemsize)
    first_columns, pairs_summer = [], kernels.pairs_summer

    def spy(*args):
        sum_pairs = pairs_summer(*args)
        return lambda first_column: (first_columns.append(first_column), sum_pairs(first_column))

    monkeypatch.setattr(kernels, "pairs_summer", spy)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in names]
    with deterministic_algorithms():
        loss = flex.triton_hierarchical_sae_loss(*problem._replace(**dict(zip(names, leaves, strict=True))))
        gradients = torch.autograd.grad(loss, leaves)
    assert first_columns == ([0, tiles * tile, 2 * tiles * tile] if "weight" in names else [])
    assert_right("hierarchical", problem, rounded._replace(**dict(zip(names, gradients, strict=True))))


# bfloat16 gradients pass through float16 numbers (g in TopK, the scratch of S_i), each in a unit of its sample.
BF16_SIZES = (5, 6, 30, 130) if INTERPRETED else (64, 32, 2048, 520)  # F = B * K: a feature belongs to one sample


@pytest.fixture
def narrow(flex, monkeypatch):
    """g in float16 whatever K is."""
    monkeypatch.setattr(submodule(flex, "topk_kernels"), "_NARROW_K", 1)


def bf16_problem(device):
    B, K, F, _ = BF16_SIZES
    problem = make_problem(*BF16_SIZES, device=device, dtypes=torch.bfloat16)
    indices = torch.randperm(F, generator=torch.Generator().manual_seed(0)).view(B, K).to(device)
    return problem._replace(indices=indices, bias=torch.zeros_like(problem.bias))


def assert_errs_by_one_rounding(value, true):
    assert value.isfinite().all()
    # Storing bfloat16, the interpreter truncates: about twice the error of rounding, and few numbers to average over.
    slack = 4 if INTERPRETED else 1.1
    assert relative_error(value, true) <= slack * relative_error(true.bfloat16(), true)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("pattern", ["uniform", "one_hot_feature"])
@pytest.mark.usefixtures("narrow")
def test_bfloat16_gradients_err_by_one_rounding_at_any_scale(flex, device, kind, scale, pattern):
    problem = make_problem(*BF16_SIZES, device=device, dtypes=torch.bfloat16, pattern=pattern)
    problem = problem._replace(**{name: getattr(problem, name) * scale for name in ("vals", "bias", "target")})
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    for name in Problem._fields[1:]:
        assert_errs_by_one_rounding(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.usefixtures("narrow")
def test_bfloat16_samples_of_any_scales_share_a_batch(flex, device, kind):
    problem = bf16_problem(device)
    scales = (1e-6, 1e6, 1.0)
    for b, scale in enumerate(scales):
        problem.vals[b] *= scale
        problem.target[b] *= scale
    # A sample whose residuals are all zero
    problem.target[3] = 0
    problem.weight[problem.indices[3]] = 0
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    for b in range(len(scales)):
        assert_errs_by_one_rounding(result.weight[problem.indices[b]], expected.weight[problem.indices[b]])
        assert_errs_by_one_rounding(result.vals[b], expected.vals[b])
    assert not result.weight[problem.indices[3]].any()
    assert not result.vals[3].any()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.usefixtures("narrow")
def test_bfloat16_gradients_are_right_where_the_loss_overflows(flex, device, kind):
    problem = bf16_problem(device)
    problem.target.mul_(1e20)
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    assert result.loss.item() == float("inf")
    for name in Problem._fields[1:]:
        assert_errs_by_one_rounding(getattr(result, name), getattr(expected, name))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("names", [("bias",), ("vals", "bias"), ("weight",), ("vals", "target"), ("target",)], ids=str)
def test_each_bfloat16_gradient_is_right_without_the_others(flex, device, names):
    problem = make_problem(*BF16_SIZES, device=device, dtypes=torch.bfloat16)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in names]
    loss = flex.triton_topk_sae_loss(*problem._replace(**dict(zip(names, leaves, strict=True))))
    gradients, expected = torch.autograd.grad(loss, leaves), truth("topk", problem)
    for name, gradient in zip(names, gradients, strict=True):
        assert_errs_by_one_rounding(gradient, getattr(expected, name))


@pytest.mark.parametrize(
    "K, wide, kept",
    [(48, None, torch.float16), (47, None, torch.float32)]
    + [(48, name, torch.float32) for name in Problem._fields[1:]],
)
def test_residuals_are_kept_in_float16_where_readme_says_so(flex, device, K, wide, kept):
    problem = make_problem(2, K, 9, 33, device=device, dtypes=torch.bfloat16)
    if wide:
        problem = problem._replace(**{wide: getattr(problem, wide).float()})
    _, residuals, *_ = flex._ops.ops.topk_forward(*problem, True, True)
    assert residuals.dtype == kept


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_what_overflows_in_bfloat16_takes_nothing_from_the_rest_of_its_sample(flex, device):
    problem = make_problem(4, 48, 9, 33, device=device, dtypes=torch.bfloat16)
    problem.target[1, 3] = float("inf")
    result, expected = run(flex.triton_topk_sae_loss, problem), truth("topk", problem)
    assert result.loss.item() == float("inf")
    for name in ("weight", "bias", "target"):
        value, true = getattr(result, name), getattr(expected, name)
        finite = true.isfinite()
        assert not finite.all() and torch.equal(value.isfinite(), finite)
        assert_errs_by_one_rounding(value[finite], true[finite])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.usefixtures("narrow")
def test_an_outlier_column_takes_no_digits_from_the_others(flex, device, kind):
    problem = bf16_problem(device)
    problem.target[:, 7] *= 1e5
    result, expected = run(triton_loss(flex, kind), problem), truth(kind, problem)
    others = [column for column in range(BF16_SIZES[3]) if column != 7]
    assert_errs_by_one_rounding(result.weight[:, 7], expected.weight[:, 7])
    assert_errs_by_one_rounding(result.weight[:, others], expected.weight[:, others])

"""What the compiler makes of the kernels for GPUs that this machine need not have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
TARGETS = (*CUDA_TARGETS, "gfx942")
FORWARD = ("_topk_forward_kernel", "_hierarchical_forward_kernel")
HIERARCHICAL_BACKWARD = ("_hierarchical_atomic_kernel", "_hierarchical_scratch_kernel")


@pytest.fixture(scope="module")
def compiled(flex, tmp_path_factory):  # flex has built the package and set LOCAL_KERNELS
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # as from Triton 3.10 on
    worker = Path(__file__).with_name("aot_worker.py")
    workers, kernels = {}, []
    for target in TARGETS:
        command = [sys.executable, str(worker), target, str(folder / target)]
        workers[target] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for target, process in workers.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        kernels += json.loads((folder / target).read_text())
    return kernels


def of(compiled, **facts):
    kernels = [k for k in compiled if all(k[name] == value for name, value in facts.items())]
    assert kernels, f"nothing compiled with {facts}"
    return kernels


def count(kernel, pattern):
    return len(re.findall(pattern, kernel["assembly"]))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_a_gpu(compiled, target):
    assert {kernel["kernel"] for kernel in of(compiled, target=target)} == {
        "_topk_forward_kernel",
        "_hierarchical_forward_kernel",
        "_hierarchical_atomic_kernel",
        "_hierarchical_scratch_kernel",
        "_gather_pairs_kernel",
        "_segment_sum_kernel",
        "_reduce_partials_kernel",
        "_sum_dots_kernel",
        "_sum_coefs_kernel",
        "_column_sum_kernel",
        "_assign_replicas_kernel",
        "_sum_replicas_kernel",
        "_group_max_kernel",
        "_select_kernel",
        "_sparse_dots_kernel",
        "_add_bias_kernel",
        "_decode_kernel",
        "_ragged_decode_kernel",
        "_sum_partials_kernel",
        "_nested_forward_kernel",
        "_level_rows_kernel",
        "_suffix_sums_kernel",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_only_gradients_as_wide_as_their_sums_are_added_atomically(compiled, target):
    # Atomic additions would round a 16-bit gradient again and again.
    assert dtypes_of(compiled, target, "_hierarchical_atomic_kernel") == {"float32", "float64"}
    assert dtypes_of(compiled, target, "_hierarchical_scratch_kernel") == {"float32", "float64", "float16", "bfloat16"}


def dtypes_of(compiled, target, kernel):
    return {variant["dtype"] for variant in of(compiled, target=target, kernel=kernel)}


@pytest.mark.parametrize("target", TARGETS)
def test_no_register_spills_to_memory(compiled, target):
    # SASS reaches local memory by STL and LDL alone. The AMD compiler counts for itself; its scalar registers spill to
    # vector registers.
    spill = r"\b(STL|LDL)\b" if target in CUDA_TARGETS else r"vgpr_spill_count:\s*[1-9]"
    spilled = {(k["kernel"], k["dtype"]): n for k in of(compiled, target=target) if (n := count(k, spill))}
    assert not spilled, f"on {target}: {spilled}"


@pytest.mark.parametrize("target", TARGETS)
def test_only_cuda_launches_go_without_triton(compiled, target):
    assert any(kernel["cached"] for kernel in of(compiled, target=target)) == (target in CUDA_TARGETS)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])  # on sm_100 two additions are one instruction
@pytest.mark.parametrize("kernel", [*FORWARD, *HIERARCHICAL_BACKWARD, "_segment_sum_kernel"])
def test_products_are_added_in_one_instruction(compiled, target, kernel):
    for variant in of(compiled, target=target, kernel=kernel, dtype="float32"):
        assert count(variant, r"\bFFMA\b") >= 16  # else there are none


def test_the_rows_of_a_column_sum_are_loaded_together(compiled):
    # One after the other they take twice the time.
    for variant in of(compiled, target="sm_90", kernel="_column_sum_kernel", dtype="float32", aligned=True):
        assert len(set(re.findall(r"\bLDG\.E\.128\S* (R\d+)", variant["assembly"]))) == 4


@pytest.mark.parametrize("kernel", ["_segment_sum_kernel", "_reduce_partials_kernel"])
@pytest.mark.parametrize("target", TARGETS)
def test_float32_rows_are_read_and_written_16_bytes_at_a_time(compiled, target, kernel):
    cuda = target in CUDA_TARGETS
    for variant in of(compiled, target=target, kernel=kernel, dtype="float32", aligned=True):
        assert count(variant, r"\bLDG\.E\.(\w+\.)*128\b" if cuda else r"_load_dwordx4\b")
        assert count(variant, r"\bSTG\.E\.(\w+\.)*128\b" if cuda else r"_store_dwordx4\b")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])  # the others have no such instruction
def test_float32_gradients_are_added_16_bytes_at_a_time(compiled, target, aligned):
    for variant in of(compiled, target=target, kernel="_hierarchical_atomic_kernel", dtype="float32", aligned=aligned):
        assert count(variant, r"\bREDG?\.\S*F32x4\b")


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize(
    "dtype, aligned", [("float32", True), ("float32", False), ("bfloat16", True), ("float16", True)]
)
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_a_lane_of_a_forward_kernel_reads_8_bytes_of_each_row(compiled, target, kernel, dtype, aligned):
    # Where tiles end with K and D, without a mask: no predicate stands before the instruction.
    read = (r"\t" if aligned else r"\b") + r"LDG\.E\.(\w+\.)*64\b"
    for variant in of(compiled, target=target, kernel=kernel, dtype=dtype, aligned=aligned):
        assert count(variant, read) >= 32  # the steps of a tile
        assert not count(variant, r"\bLDG\.E\.(\w+\.)*128\b")


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_sums_and_scans_over_steps_stay_inside_a_thread(compiled, target, kernel, dtype):
    for variant in of(compiled, target=target, kernel=kernel, dtype=dtype):
        # One reduction over 32 lanes, that of the loss.
        assert count(variant, r"\bSHFL\b") == (10 if dtype == "float64" else 5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_no_scan_of_the_ordered_gradient_crosses_lanes(compiled, target, dtype):
    for variant in of(compiled, target=target, kernel="_hierarchical_scratch_kernel", dtype=dtype):
        # SHFL.UP is what a scan across lanes compiles to; the dot products of d vals reduce by other shuffles.
        assert not count(variant, r"\bSHFL\.UP\b")


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_atomic_hierarchical_gradient_adds_floats_atomically(compiled, target):
    atomics = r"\b(RED|REDG|ATOM|ATOMG)\." if target in CUDA_TARGETS else r"_atomic_"
    of_floats = r"\b(RED|REDG|ATOM|ATOMG)\.\S*F(32|64)" if target in CUDA_TARGETS else r"_atomic_\w*f(32|64)"
    adds_floats, adds_integers = (
        "_hierarchical_atomic_kernel",
        ("_hierarchical_forward_kernel", "_assign_replicas_kernel"),
    )
    for kernel in of(compiled, target=target):
        name = kernel["kernel"]
        assert bool(count(kernel, of_floats)) == (name == adds_floats), name
        assert name == adds_floats or name in adds_integers or not count(kernel, atomics), name


def test_other_batch_sizes_and_dictionaries_compile_no_kernel_again(compiled):
    again = [(k["target"], k["dtype"], k["kernel"], k["B"], k["F"]) for k in compiled if not k["first"]]
    # But for the tiles of a dictionary that leaves the L2 cache, with weights of samples and without.
    narrower = "_hierarchical_atomic_kernel", 64, 2**17
    expected = [(target, dtype, *narrower) for target in TARGETS for dtype in ("float32", "float64")] * 2
    # And for scratch of 2 GiB, whose offsets AMD's buffer instructions do not hold.
    scratch = (*["_hierarchical_scratch_kernel"] * 2, "_segment_sum_kernel")
    expected += [("gfx942", "float32", kernel, 2**16, 256) for kernel in scratch]
    assert sorted(again) == sorted(expected)

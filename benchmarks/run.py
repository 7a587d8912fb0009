# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2", "tqdm"]
# ///
"""Time the losses of this checkout beside other ways to compute them, on a GPU.

    python benchmarks/run.py --suite targets --json benchmarks/results/targets.json [--baseline NAME=PATH]

Every row is compared with float64 before it is timed, and what is wrong is not timed. Rows take turns, on inputs that
rotate and behind an emptied L2 cache. The figure is the median of CUDA events, with the host a few milliseconds ahead
of the device, as it is in training behind the encoder; what the host takes to launch a step is recorded beside it.
benchmarks/table.py and benchmarks/plot.py read the results.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
LOSSES = ("topk", "hierarchical")
PEERS = {
    "topk": ("torch eager", "torch.compile", "embedding_bag", "dense"),
    "hierarchical": ("torch eager", "torch.compile"),
}

# Relative Frobenius errors of loss and gradients: five and three times those of the worst row that was seen, the dense
# one (8e-7 and 3.4e-3). Leaving out one of 4096 samples changes a gradient by 1.6e-2.
BOUNDS = {"float32": 4e-6, "bfloat16": 1e-2}
# And of each row of d weight, as one that is lost does not show in the error of all. A row that is rounded to bfloat16
# is off by at most 4e-3, one without one of its ten pairs by some third.
ROW_BOUND = 0.1

# Three input sets: no step sees the indices, vals or target of the one before.
SETS = 3
# A row is sampled for about this long, so that a slow one gets few samples and the suite stays short.
SAMPLING_MS = 150
SAMPLES = (3, 50)
# The device spins for so many cycles before a step, 4 ms at 2 GHz, so that it never waits for the host: most steps are
# launched in less, and the launches of the longest come faster than the device works them off.
HEAD_START = 2**23

# Bytes that the package must move, by loss and mode: e is the element size, R counts the rows of weight in use. And the
# floor that the ceilings of the same run set for it, each pass hiding all but its slowest part: gather and atomic are
# the times (ms) of one pass over the pairs (i, k), copy is in bytes per ms.
TRAFFIC = {
    # weight rows gathered
    ("topk", "forward"): ("B*K*D*e", "gather"),
    # and residuals gathered by feature, weight read again for d vals, d weight written
    ("topk", "step"): ("2*B*K*D*e + (R + F)*D*e", "gather + max(gather, (R + F)*D*e / copy)"),
    ("hierarchical", "forward"): ("B*K*D*e", "gather"),
    # gathered forward and backward, float32 atomics for every pair, d weight zeroed before
    ("hierarchical", "step"): ("2*B*K*D*e + 4*B*K*D + F*D*e", "gather + F*D*e / copy + max(gather, atomic)"),
    # no atomics: the pairs' contributions are written and read back, d weight written. A bfloat16 weight takes this way
    # in the other modes as well.
    ("hierarchical", "deterministic"): (
        "4*B*K*D*e + F*D*e",
        "gather + max(gather, B*K*D*e / copy) + (B*K + F)*D*e / copy",
    ),
}
TRAFFIC |= {(loss, "graph"): TRAFFIC[loss, "step"] for loss in LOSSES}
TRAFFIC["hierarchical", "deterministic graph"] = TRAFFIC["hierarchical", "deterministic"]


@dataclass(frozen=True)
class Shape:
    B: int
    K: int
    F: int
    D: int
    dtype: str = "float32"
    distribution: str = "uniform"


@dataclass(frozen=True)
class Case:
    """One line of a suite. The modes:

    forward        the loss under no_grad
    step           loss and backward
    deterministic  step under torch.use_deterministic_algorithms(True)
    adam           step and torch.optim.Adam over weight and bias
    wall           step as the user sees it: many in a row, then one synchronisation
    one thread     wall under torch.autograd.set_multithreading_enabled(False)
    graph          the replay of a captured step: what the device takes, whatever the host takes to launch it
    deterministic graph
    """

    shape: Shape
    loss: str
    mode: str
    peers: tuple[str, ...] = ()


def targets() -> list[Case]:
    """The package's headline sizes, with every peer where dtype and distribution are plain, and as CUDA graphs."""
    cases = []
    for K in (32, 64, 128):
        shape = Shape(4096, K, 65536, 2304)
        cases += [Case(shape, loss, "step", PEERS[loss]) for loss in LOSSES]
        if K != 64:
            cases += [Case(shape, loss, "forward") for loss in LOSSES]
            cases += [Case(shape, "hierarchical", "deterministic")]
            cases += [Case(replace(shape, distribution="zipf"), loss, "step") for loss in LOSSES]
            half = replace(shape, dtype="bfloat16")
            cases += [Case(half, loss, "forward") for loss in LOSSES]
            cases += [Case(half, "topk", "step", ("embedding_bag", "dense")), Case(half, "hierarchical", "step")]
            cases += [Case(half, "hierarchical", "deterministic")]
        cases += [Case(replace(shape, B=8192), loss, "step") for loss in LOSSES]
    return [also for case in cases for also in ((case,) if case.mode == "forward" else (case, graph(case)))]


def graph(case: Case) -> Case:
    """The same as a CUDA graph, of the package and the baselines alone."""
    return replace(case, mode="graph" if case.mode == "step" else f"{case.mode} graph", peers=())


def readme() -> list[Case]:
    """A training step: time and peak memory against the compiled references."""
    cases = []
    for K, dtype in itertools.product((32, 64, 128), BOUNDS):
        shape = Shape(8192, K, 65536, 2304, dtype)
        cases += [Case(shape, loss, mode, ("torch.compile",)) for mode in ("adam", "step") for loss in LOSSES]
        cases += [Case(shape, "hierarchical", "deterministic")]
    return cases


# One axis at a time around the base point; sizes that are a multiple of nothing among them.
SCALING_BASE = Shape(4096, 64, 65536, 2304)
SCALING_AXES = {
    "B": (256, 1000, 4096, 16384),
    "K": (8, 50, 64, 128, 512),
    "F": (8192, 50000, 65536, 262144, 1048576),
    "D": (384, 1000, 1023, 2304, 2311, 2312, 4096, 8192),
}
# And a batch and a dictionary that are both large.
SCALING_LARGE = replace(SCALING_BASE, B=16384, F=131072)


def scaling() -> list[Case]:
    """Each axis alone, then B and F together, as a CUDA graph too; the dense matmul where F decides whether it wins."""
    shapes = {SCALING_BASE: ("dense",)}
    for axis, sizes in SCALING_AXES.items():
        for size in sizes:
            shapes.setdefault(replace(SCALING_BASE, **{axis: size}), ("dense",) if axis == "F" else ())
    shapes[SCALING_LARGE] = ()
    cases = [
        Case(shape, loss, "step", peers if loss == "topk" else ()) for shape, peers in shapes.items() for loss in LOSSES
    ]
    return [also for case in cases for also in (case, graph(case))]


def small() -> list[Case]:
    """A step that is over before the host has launched it."""
    shape = Shape(256, 32, 16384, 768)
    return [Case(shape, loss, mode, PEERS[loss]) for mode in ("wall", "one thread", "graph") for loss in LOSSES]


SUITES = {suite.__name__: suite for suite in (targets, readme, scaling, small)}


def quick(case: Case) -> Case:
    """The same line at a size that only shows that it runs."""
    shape = case.shape
    return replace(case, shape=replace(shape, B=max(64, shape.B // 16), F=shape.F // 16, D=max(64, shape.D // 4)))


# Inputs and truth


def make_indices(shape: Shape) -> torch.Tensor:
    """K distinct features a row, [B, K] int64: all alike, or with probability proportional to 1 / rank (Zipf's law)."""
    popularity = torch.ones(shape.F, device=DEVICE)
    if shape.distribution == "zipf":
        popularity /= 1 + torch.randperm(shape.F, device=DEVICE)
    drawn = []
    # 2**26 floats at a time: 256 MB instead of B * F.
    rows = max(1, 2**26 // shape.F)
    for start in range(0, shape.B, rows):
        # The K first in a race of exponential clocks with these rates are K draws without replacement.
        clocks = torch.empty(min(rows, shape.B - start), shape.F, device=DEVICE).exponential_().div_(popularity)
        drawn.append(clocks.topk(shape.K, largest=False).indices)
    indices = torch.cat(drawn)
    # topk puts the popular features first; shuffled, the order of the columns favours nobody.
    return indices.gather(1, torch.rand(indices.shape, device=DEVICE).argsort(1))


class Inputs:
    """weight and bias, and SETS times (indices, vals, target); weight, bias and vals require grad."""

    def __init__(self, shape: Shape):
        torch.manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        self.weight = torch.randn(shape.F, shape.D, device=DEVICE, dtype=dtype).div_(shape.D**0.5).requires_grad_()
        self.bias = torch.randn(shape.D, device=DEVICE, dtype=dtype).requires_grad_()
        self.sets = []
        for _ in range(SETS):
            vals = torch.randn(shape.B, shape.K, device=DEVICE).abs_().sort(dim=1, descending=True).values
            target = torch.randn(shape.B, shape.D, device=DEVICE, dtype=dtype)
            self.sets.append((make_indices(shape), vals.to(dtype).requires_grad_(), target))
        self.rows = self.sets[0][0].unique().numel()  # R

    def leaves(self) -> list[torch.Tensor]:
        return [self.weight, self.bias] + [vals for _, vals, _ in self.sets]

    def clear(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    def step(self, function, i: int, optimizer=None) -> torch.Tensor:
        """One step on set `i`, with backward and the optimiser unless grad mode is off."""
        indices, vals, target = self.sets[i]
        loss = function(indices, self.weight, vals, self.bias, target)
        if loss.requires_grad:
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        return loss.detach()


@dataclass
class Truth:
    """What a row has to give, in float64: the loss of every set, and all results of set 0 by name."""

    losses: list[torch.Tensor]
    first: dict[str, torch.Tensor]


@torch.no_grad()
def true_loss(loss: str, inputs: Inputs, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of set `i`, and the sum of the residuals that it is made of [B, D]."""
    indices, vals, target = inputs.sets[i]
    (B, K), D = indices.shape, target.shape[1]
    residual = inputs.bias.double() - target.double()
    suffix, squares, hierarchical = torch.zeros_like(residual), 0.0, loss == "hierarchical"
    for k in range(K):
        residual.addcmul_(vals[:, k, None].double(), inputs.weight[indices[:, k]].double())
        if hierarchical or k == K - 1:
            suffix += residual
            squares += residual.square().sum()
    return squares / (B * D * (K if hierarchical else 1)), suffix


@torch.no_grad()
def truth(loss: str, inputs: Inputs) -> Truth:
    """One step of K at a time, so that nothing is larger than [F, D]."""
    indices, vals, target = inputs.sets[0]
    (B, K), D = indices.shape, target.shape[1]
    v, hierarchical = vals.double(), loss == "hierarchical"
    value, suffix = true_loss(loss, inputs, 0)
    count = B * D * (K if hierarchical else 1)
    want = {
        "loss": value,
        "weight": torch.zeros(inputs.weight.shape, dtype=torch.float64, device=DEVICE),
        "vals": torch.empty_like(v),
        "bias": suffix.sum(0) * (2 / count),
    }
    residual = inputs.bias.double() - target.double()
    for k in range(K):
        rows = inputs.weight[indices[:, k]].double()
        want["weight"].index_add_(0, indices[:, k], suffix * v[:, k, None], alpha=2 / count)
        want["vals"][:, k] = (rows * suffix).sum(1) * (2 / count)
        if hierarchical:
            suffix -= residual.addcmul_(v[:, k, None], rows)
    return Truth([value] + [true_loss(loss, inputs, i)[0] for i in range(1, SETS)], want)


class ParityError(Exception):
    """A row computes something else."""


def check(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> dict[str, float]:
    """The relative Frobenius errors. Raises ParityError where one is beyond `bound` or not a number, and where one of a
    row of d weight is beyond ROW_BOUND."""
    errors = {}
    for name, value in got.items():
        difference = value.double().sub_(want[name])
        errors[name] = (difference.norm() / want[name].norm()).item()
        if name == "weight":
            off = (difference.norm(dim=1) > ROW_BOUND * want[name].norm(dim=1)).nonzero()
            if len(off):
                raise ParityError(f"weight is off in {len(off)} rows, the first is {off[0].item()}")
    for name, error in errors.items():
        if not error <= bound:
            raise ParityError(f"{name} is off by {error:.1e}, allowed {bound:.0e}")
    return errors


# What is timed


def load_package() -> types.ModuleType:
    """Build this checkout and load it the way users do."""
    sys.path.insert(0, str(ROOT / "scripts"))
    build_local = importlib.import_module("build_local")
    kernels = importlib.import_module("kernels")
    build_local.build(ROOT / "build")
    os.environ["LOCAL_KERNELS"] = f"t-tech/flex-sae={ROOT}"
    return kernels.get_kernel("t-tech/flex-sae", version=1, trust_remote_code=True)


def load_baseline(argument: str) -> tuple[str, types.ModuleType]:
    """Load [NAME=]PATH: a file, a package, or a folder of modules, as one namespace with the public functions."""
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        label, path = "", argument
    path = Path(path).resolve()
    if not path.is_dir() and path.suffix != ".py":
        sys.exit(f"--baseline {argument}: {path} is neither a folder nor a Python file.")
    name = f"baseline_{len(sys.modules)}"  # a name of its own
    init = path / "__init__.py"
    if path.is_file() or init.is_file():
        source, folders = (path, None) if path.is_file() else (init, [str(path)])
        spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folders)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(path)]
        for source in sorted(path.glob("*.py")):
            names = vars(importlib.import_module(f"{name}.{source.stem}"))
            vars(module).update({key: value for key, value in names.items() if key.startswith("triton_")})
    if not any(hasattr(module, f"triton_{loss}_sae_loss") for loss in LOSSES):
        sys.exit(f"{path} has neither triton_topk_sae_loss nor triton_hierarchical_sae_loss.")
    return label or path.stem, module


def load_baselines(arguments: list[str]) -> dict[str, types.ModuleType]:
    """All of them by name."""
    baselines = {}
    for argument in arguments:
        label, module = load_baseline(argument)
        if label in baselines or label in ("flex_sae", *itertools.chain(*PEERS.values())):
            sys.exit(f"--baseline {argument}: another row is called {label}, choose a NAME of its own.")
        baselines[label] = module
    return baselines


def embedding_bag_loss(indices, weight, vals, bias, target):
    """TopK with the bag of embeddings that torch has a kernel for."""
    recon = torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=vals, mode="sum") + bias
    return torch.nn.functional.mse_loss(recon, target)


def dense_loss(indices, weight, vals, bias, target):
    """TopK with the activations scattered into [B, F] and a matmul."""
    acts = vals.new_zeros(len(vals), len(weight)).scatter(1, indices, vals)
    return torch.nn.functional.mse_loss(torch.addmm(bias, acts, weight), target)


@functools.cache
def compiled(function):
    """The modes of a shape share what torch.compile made for it."""
    return torch.compile(function, dynamic=False)


def implementations(case: Case, package, baselines: dict) -> dict:
    """The functions of a case's rows by name."""
    name = f"triton_{case.loss}_sae_loss"
    reference = getattr(package, f"{case.loss}_sae_loss")
    peers = {
        "torch eager": reference,
        "torch.compile": compiled(reference),
        "embedding_bag": embedding_bag_loss,
        "dense": dense_loss,
    }
    return {
        "flex_sae": getattr(package, name),
        **{label: getattr(module, name) for label, module in baselines.items() if hasattr(module, name)},
        **{peer: peers[peer] for peer in case.peers},
    }


# Measuring


def sample(steps: dict, prepare) -> dict[str, dict[str, list[float]]]:
    """Milliseconds that every step takes the device and the host, "ms" and "host_ms" by its name. Steps, which have run
    before, take turns; step(i) is on set i, prepare() is not timed."""
    # Reading four times the L2 empties it and leaves no dirty lines for the step to write back.
    flush = torch.zeros(torch.cuda.get_device_properties(DEVICE).L2_cache_size, device=DEVICE)
    rounds, taken = {}, {name: [] for name in steps}
    for name, step in steps.items():
        prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(1)
        torch.cuda.synchronize()
        rounds[name] = min(max(int(SAMPLING_MS / 1e3 / (time.perf_counter() - begin)), SAMPLES[0]), SAMPLES[1])
    for i in range(max(rounds.values(), default=0)):
        for name, step in steps.items():
            if i < rounds[name]:
                prepare()
                torch.cuda.synchronize()
                flush.sum()
                torch.cuda._sleep(HEAD_START)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                begin = time.perf_counter()
                step(i % SETS)
                host_ms = (time.perf_counter() - begin) * 1e3
                end.record()
                taken[name].append((start, end, host_ms))
    torch.cuda.synchronize()
    return {
        name: {
            "ms": [start.elapsed_time(end) for start, end, _ in samples],
            "host_ms": [host_ms for *_, host_ms in samples],
        }
        for name, samples in taken.items()
    }


def sample_wall(steps: dict, prepare) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a step until both host and device are done, "ms" by its name: 50 batches of 20 steps, taking
    turns."""
    times = {name: {"ms": []} for name in steps}
    for batch in range(51):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(20):
                prepare()
                step(i % SETS)
            torch.cuda.synchronize()
            if batch > 0:  # the first is warm-up
                times[name]["ms"].append((time.perf_counter() - begin) * 1e3 / 20)
    return times


@triton.jit
def _gather_kernel(
    indices_ptr,  # [B, K]
    table_ptr,  # [F, D]
    out_ptr,  # [B, D]
    K,
    D,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, K, STEPS):
        k = start + tl.arange(0, STEPS)
        feature = tl.load(indices_ptr + sample * K + k, mask=k < K, other=0)
        mask = (k < K)[:, None] & (columns < D)[None, :]
        rows = tl.load(table_ptr + feature[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32), axis=0)
    tl.store(out_ptr + sample * D + columns, total, mask=columns < D)


@triton.jit
def _atomic_kernel(
    indices_ptr,  # [B, K]
    table_ptr,  # [F, D] float32
    K,
    D,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for start in range(0, K, STEPS):
        k = start + tl.arange(0, STEPS)
        feature = tl.load(indices_ptr + sample * K + k, mask=k < K, other=0)
        mask = (k < K)[:, None] & (columns < D)[None, :]
        ones = tl.full([STEPS, BLOCK_D], 1.0, tl.float32)
        tl.atomic_add(table_ptr + feature[:, None] * D + columns[None, :], ones, mask=mask, sem="relaxed")


def measure_ceilings(inputs: Inputs) -> dict[str, float]:
    """What bare memory traffic takes on these inputs: gather and atomic in ms a pass, copy in bytes per ms. The atomic
    additions go to uniform rows: on skewed ones they wait for each other, which a step can avoid."""
    (F, D), (B, K) = inputs.weight.shape, inputs.sets[0][0].shape
    try:
        out = torch.empty(B, D, device=DEVICE)
        table = torch.zeros(F, D, device=DEVICE)
        # 1 GiB, far larger than any cache
        source, copied = torch.zeros(2, 2**28, device=DEVICE)
    except torch.OutOfMemoryError:
        return {}
    # Samples fastest, chunks of columns slowest: a chunk of all rows stays in L2 while every sample walks it. One warp
    # and chunks of 256 bytes were fastest in a sweep of 64 to 512 columns on an H200.
    gather_block = 256 // inputs.weight.element_size()
    uniform = torch.randint(F, (B, K), device=DEVICE)
    meta = {"STEPS": 16, "num_warps": 1}

    def gather(i):
        grid = (B, triton.cdiv(D, gather_block))
        _gather_kernel[grid](inputs.sets[i][0], inputs.weight, out, K, D, BLOCK_D=gather_block, **meta)

    def atomic(i):
        _atomic_kernel[(B, triton.cdiv(D, 64))](uniform, table, K, D, BLOCK_D=64, **meta)

    steps = {"gather": gather, "atomic": atomic, "copy": lambda i: copied.copy_(source)}
    for step in steps.values():
        step(0)  # compiles
    times = {name: statistics.median(took["ms"]) for name, took in sample(steps, prepare=lambda: None).items()}
    return {**times, "copy": 2 * source.nbytes / times["copy"]}


def measure_memory(inputs: Inputs, step, optimizer) -> dict[str, float]:
    """Peaks of one step, MiB: beyond the inputs, beyond inputs and gradients, and in all with optimiser and inputs."""
    inputs.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.grad.nbytes for leaf in inputs.leaves() if leaf.grad is not None)
    state = optimizer.state.values() if optimizer else ()
    held = [inputs.weight, inputs.bias, *inputs.sets[0]] + [moment for moments in state for moment in moments.values()]
    return {
        "beyond_inputs_mib": peak / 2**20,
        "beyond_gradients_mib": (peak - gradients) / 2**20,
        "total_mib": (peak + sum(tensor.nbytes for tensor in held)) / 2**20,
    }


def capture(inputs: Inputs, function):
    """Capture a step on every set; returns the graphs and their losses. The leaves hold the gradients of set 0."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            inputs.clear()
            inputs.step(function, 0)
    torch.cuda.current_stream().wait_stream(stream)
    # They take turns, so that they may share their memory.
    graphs, pool = [torch.cuda.CUDAGraph() for _ in range(SETS)], torch.cuda.graph_pool_handle()
    losses = [None] * SETS
    for i in reversed(range(SETS)):
        inputs.clear()
        with torch.cuda.graph(graphs[i], pool=pool):
            losses[i] = inputs.step(function, i)
    return graphs, losses


def prepare_row(case: Case, inputs: Inputs, function, want: Truth, optimizer) -> tuple[dict, object]:
    """Check a row; returns its errors and memory, and the step to time. Raises whatever the row raises."""
    bound = BOUNDS[case.shape.dtype]

    def results(loss):
        if case.mode == "forward":
            return {"loss": loss}
        gradients = {"weight": inputs.weight.grad, "vals": inputs.sets[0][1].grad, "bias": inputs.bias.grad}
        for name, gradient in gradients.items():
            if gradient is None:
                raise ParityError(f"{name} has no gradient")
        return {"loss": loss, **gradients}

    def step(i):
        return inputs.step(function, i, optimizer)

    def check_other_sets(loss_of):
        for i in range(1, SETS):
            check({"loss": loss_of(i)}, {"loss": want.losses[i]}, bound)

    inputs.clear()
    if case.mode.endswith("graph"):
        graphs, losses = capture(inputs, function)

        def replay(i):
            graphs[i].replay()
            return losses[i]

        errors = check(results(replay(0)), want.first, bound)
        check_other_sets(replay)
        return {"errors": errors}, replay

    first = results(step(0))
    errors = check(first, want.first, bound)
    if case.mode == "deterministic":
        inputs.clear()
        again = results(step(0))
        if not all(torch.equal(first[name], again[name]) for name in first):
            raise ParityError("not the same bits in a second run")
        del again
    del first
    inputs.clear()
    check_other_sets(step)
    return {"errors": errors, **measure_memory(inputs, step, optimizer)}, step


def failure(error: Exception) -> dict[str, str]:
    """The status that an error gives a record."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    status = "wrong" if isinstance(error, ParityError) else "failed"
    return {"status": status, "detail": str(error).strip().partition("\n")[0]}


def run_case(case: Case, inputs: Inputs, functions: dict, want: Truth, ceilings: dict) -> list[dict]:
    """Check and time every row of a case. What a row raises becomes its status; what timing them raises, that of all
    that were right."""
    # lr=0: the same work, and the weight stays the one that was checked
    optimizer = torch.optim.Adam([inputs.weight, inputs.bias], lr=0.0) if case.mode == "adam" else None
    records, steps = {}, {}
    torch.use_deterministic_algorithms(case.mode.startswith("deterministic"))
    one_thread = torch.autograd.set_multithreading_enabled(case.mode != "one thread")
    with torch.set_grad_enabled(case.mode != "forward"), one_thread:
        for row, function in functions.items():
            record = records[row] = {**asdict(case.shape), "loss": case.loss, "mode": case.mode, "row": row}
            try:
                measured, steps[row] = prepare_row(case, inputs, function, want, optimizer)
                record.update(status="ok", **measured)
            except Exception as error:
                record.update(failure(error))
            inputs.clear()
            torch.cuda.empty_cache()
        try:
            timed = (sample_wall if case.mode in ("wall", "one thread") else sample)(steps, inputs.clear)
        except Exception as error:
            timed = {}
            for row in steps:
                records[row].update(failure(error))
    torch.use_deterministic_algorithms(False)

    for row, times in timed.items():
        for what, values in times.items():
            lower, median, upper = statistics.quantiles(values, n=4)
            records[row].update({what: median, f"{what}_quartiles": [lower, upper]})
        ours = ceilings if row == "flex_sae" else {}  # another row may go about it in another way
        records[row].update(samples=len(times["ms"]), **traffic(case, inputs.rows, ours, records[row]["ms"]))
    return list(records.values())


def traffic(case: Case, rows: int, ceilings: dict, ms: float) -> dict:
    """Bytes and floor of a case that uses so many rows of weight, and what `ms` makes of them."""
    shape, mode = case.shape, case.mode
    if case.loss == "hierarchical" and shape.dtype == "bfloat16" and mode in ("step", "graph"):
        mode = "deterministic"
    if (case.loss, mode) not in TRAFFIC:
        return {}
    formula, floor_formula = TRAFFIC[case.loss, mode]
    names = {**asdict(shape), "R": rows, "e": getattr(torch, shape.dtype).itemsize}
    moved = eval(formula, names.copy())
    record = {"R": rows, "bytes": moved, "bytes_formula": formula, "tb_s": moved / ms / 1e9}
    # Atomic additions are measured on uniform rows, which says nothing of others.
    if ceilings and (shape.distribution == "uniform" or "atomic" not in floor_formula):
        floor = eval(floor_formula, {**names, **ceilings, "max": max})
        record.update(floor_ms=floor, floor_formula=floor_formula, fraction=floor / ms, ceilings=ceilings)
    return record


# The run


def describe(record: dict) -> str:
    """A record in one line."""
    line = "{loss:12} {mode:13} {B:5} {K:3} {F:7} {D:4} {dtype:8} {distribution:7} {row:13}".format(**record)
    if record["status"] != "ok":
        return f"{line} {record['status']} {record.get('detail', '')}"
    line += f" {record['ms']:8.3f} ms"
    if "host_ms" in record:
        line += f" {record['host_ms']:8.3f} ms of the host"
    if "beyond_gradients_mib" in record:
        line += f" {record['beyond_gradients_mib']:8.0f} MiB"
    if "fraction" in record:
        line += f" {record['tb_s']:5.2f} TB/s {record['fraction']:4.0%} of the ceiling"
    return line


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it does not run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(command: str) -> dict[str, str]:
    """What the figures depend on. `command` is what made them."""
    # FLEX_SAE_COMMIT: for a copy of the checkout without its .git
    commit = os.environ.get("FLEX_SAE_COMMIT") or output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    # Results of other suites, and README's tables of them, change nothing that is measured.
    changed = ("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    if "FLEX_SAE_COMMIT" not in os.environ and output_of(*changed):
        commit += "-dirty"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "command": command,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.partition("\n")[0] or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


class Results:
    """The records so far, and `file` with all of them after each case, so that an interruption loses none."""

    def __init__(self, suite: str, command: str, file: Path | None):
        self.about, self.records, self.file = {"suite": suite, **environment(command)}, [], file
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, records: list[dict]) -> None:
        self.records += records
        if self.file:
            # Whole or not at all
            temporary = self.file.with_name(self.file.name + ".tmp")
            temporary.write_text(json.dumps({**self.about, "records": self.records}, indent=1) + "\n")
            temporary.replace(self.file)


def run(cases: list[Case], package, baselines: dict, results: Results, with_ceilings: bool) -> None:
    """Run the cases; those of one shape stand together and share their inputs, truths and ceilings."""
    with tqdm(total=len(cases), unit="case", dynamic_ncols=True, disable=None) as progress:
        for shape, group in itertools.groupby(cases, key=lambda case: case.shape):
            inputs, truths = None, {}
            for case in group:
                progress.set_description(f"{case.loss} {case.mode} {shape.B}x{shape.K} of {shape.F}x{shape.D}")
                functions = implementations(case, package, baselines)
                try:
                    if inputs is None:
                        inputs, ceilings = Inputs(shape), {}
                        if with_ceilings:
                            ceilings = measure_ceilings(inputs)
                    if case.loss not in truths:
                        truths[case.loss] = truth(case.loss, inputs)
                    records = run_case(case, inputs, functions, truths[case.loss], ceilings)
                except torch.OutOfMemoryError as error:  # what all rows share does not fit
                    line = {**asdict(shape), "loss": case.loss, "mode": case.mode}
                    records = [{**line, "row": row, **failure(error)} for row in functions]
                results.add(records)
                for record in records:
                    progress.write(describe(record))
                progress.update()
            del inputs, truths
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the losses of this checkout beside other ways to compute them.")
    parser.add_argument("--suite", choices=SUITES, default="targets", help="what to run (default: %(default)s)")
    parser.add_argument("--baseline", action="append", default=[], metavar="[NAME=]PATH", help="also time this code")
    parser.add_argument("--quick", action="store_true", help="small sizes: see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU that torch.cuda can see, and there is none here.", file=sys.stderr)
        sys.exit(2)

    # one compiled reference a shape, and a suite has more shapes than torch's limit of 8
    torch._dynamo.config.recompile_limit = 1000
    cases, baselines = SUITES[args.suite](), load_baselines(args.baseline)
    if args.quick:
        cases = [quick(case) for case in cases]
    options = ["--quick"] * args.quick + [f"--baseline {name}=PATH" for name in baselines]
    results = Results(args.suite, " ".join(["python benchmarks/run.py --suite", args.suite, *options]), args.json)
    run(cases, load_package(), baselines, results, with_ceilings=args.suite != "small")
    if any(record["row"] == "flex_sae" and record["status"] != "ok" for record in results.records):
        sys.exit("This package gave a wrong result, failed or ran out of memory; see above.")


if __name__ == "__main__":
    main()

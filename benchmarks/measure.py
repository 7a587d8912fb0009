"""Time on the device, time on the wall and peak memory of steps; `step(i)` runs on input set i.

Device time is the median of CUDA events. Steps take turns, so that a GPU that slows down slows all of them. Before each
one the L2 cache is emptied and the device spins for a few milliseconds: the host is then ahead of it, as it is in
training behind the encoder. Wall time is that of many steps in a row, until host and device are done.
"""

import statistics
import time

import torch
from inputs import SETS

# A step is sampled for about this long, so that a slow one gets few samples and a suite stays short.
SAMPLING_MS = 150
# At least and at most so many samples.
SAMPLES = (3, 50)
# Cycles that the device spins for, 4 ms at 2 GHz: most steps are launched in less, and the launches of longer ones come
# faster than the device works them off.
HEAD_START = 2**23
# Wall time is the median of so many runs of steps in a row.
RUNS = 5


def times(steps: dict) -> dict[str, dict[str, float]]:
    """The medians "ms" and "wall_ms" by the name of the step. Every step has run before."""
    counts = {name: count(step) for name, step in steps.items()}
    device, wall = device_ms(steps, counts), wall_ms(steps, counts)
    return {name: {"ms": device[name], "wall_ms": wall[name]} for name in steps}


def count(step) -> int:
    """How many samples a step gets."""
    return min(max(int(SAMPLING_MS / run_ms(step, 1)), SAMPLES[0]), SAMPLES[1])


def run_ms(step, steps: int) -> float:
    """Wall time of so many steps in a row."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(steps):
        step(i % SETS)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def device_ms(steps: dict, counts: dict[str, int]) -> dict[str, float]:
    # Reading four times its size empties the L2 cache and leaves no dirty lines for the step to write back.
    flush = torch.zeros(torch.cuda.get_device_properties("cuda").L2_cache_size, device="cuda")
    events = {name: [] for name in steps}
    for i in range(max(counts.values(), default=0)):
        for name, step in steps.items():
            if i < counts[name]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                flush.sum()
                torch.cuda._sleep(HEAD_START)
                start.record()
                step(i % SETS)
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}


def wall_ms(steps: dict, counts: dict[str, int]) -> dict[str, float]:
    runs = {name: [] for name in steps}
    for _ in range(RUNS):
        for name, step in steps.items():
            runs[name].append(run_ms(step, counts[name]) / counts[name])
    return {name: statistics.median(values) for name, values in runs.items()}


def memory(inputs, step, optimizer) -> dict[str, float]:
    """The peak of a step in GiB: in all, with inputs and optimiser state, and beyond inputs, state and gradients."""
    inputs.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()] if optimizer else []
    held = sum(tensor.nbytes for tensor in (*inputs.sets[0], *moments))
    return {"total_gib": (peak + held) / 2**30, "extra_gib": (peak - gradients) / 2**30}


def capture(step):
    """The same step as the replay of a CUDA graph, one graph for each input set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(SETS):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graphs, results = [], []
    for i in range(SETS):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(step(i))
        graphs.append(graph)

    def replay(i):
        graphs[i].replay()
        return results[i]

    return replay

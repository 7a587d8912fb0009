# /// script
# requires-python = ">=3.11"
# dependencies = ["kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2", "tqdm>=4.66"]
# ///
"""Time the losses and training steps of this checkout beside other ways to compute them, on a GPU.

    python benchmarks/run.py --suite NAME [--baseline NAME=PATH] [--quick] [--out FILE]

Every row is compared with float64 before it is timed; a row that is wrong is recorded as wrong and not timed.
cases.py says what is measured, measure.py how, and report.py makes tables and the plot from the results.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import decode
import measure
import nested
import records
import torch
import training
from cases import SUITES, Case, quick
from inputs import Inputs, ParityError, check, check_repeats
from peers import implementations, load_baselines, load_package
from tqdm import tqdm


def failure(error: Exception) -> dict[str, str]:
    """What an error leaves in a record."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    status = "wrong" if isinstance(error, ParityError) else "failed"
    return {"status": status, "detail": str(error).strip().partition("\n")[0]}


def blank(case: Case, row: str) -> dict:
    step = {"precision": case.precision, "optimizer": case.optimizer} if case.precision else {}
    return {**asdict(case.shape), "loss": case.loss, "mode": case.mode, **step, "row": row}


@contextlib.contextmanager
def torch_mode(case: Case):
    """torch's global settings that a case asks for. In deterministic mode torch fills new memory unless told not to."""
    torch.use_deterministic_algorithms(case.mode == "deterministic")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high" if case.precision == "TF32" else "highest")
    try:
        with torch.autograd.set_multithreading_enabled(case.mode != "one thread"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def prepare(case: Case, inputs: Inputs, function, truths: list[dict], optimizer):
    """Check a row. Returns the step to time, and what its record gets; raises whatever the row raises."""

    def step(i):
        return inputs.step(function, i)

    def step_with_optimizer(i):
        results = inputs.step(function, i)
        optimizer.step()
        return results

    if case.mode == "graph":
        step = measure.capture(step)
    record = {"status": "ok", "error": check(case, step, truths)}
    if case.mode == "deterministic":
        check_repeats(step)
    if case.mode == "graph":
        return step, record  # its memory is the graph's own, whatever a step allocates
    if optimizer:
        step = step_with_optimizer
        step(0)  # allocates its state
    return step, {**record, **measure.memory(inputs, step, optimizer)}


def run_rows(case: Case, inputs, functions: dict, prepare) -> list[dict]:
    """Check and time every row of a case; ``prepare(row, function)`` checks one, and gives its step and what its record
    gets. An error becomes the status of its row; one while they are timed, of all."""
    rows, steps = {row: blank(case, row) for row in functions}, {}
    for row, function in functions.items():
        try:
            steps[row], measured = prepare(row, function)
            rows[row].update(measured)
        except Exception as error:
            rows[row].update(failure(error))
        release(inputs)
    try:
        for row, times in measure.times(steps).items():
            rows[row].update(times)
    except Exception as error:
        for row in steps:
            rows[row].update(failure(error))
    release(inputs)
    return list(rows.values())


def run_case(case: Case, inputs: Inputs, functions: dict, truths: list[dict]) -> list[dict]:
    """The rows of a loss."""
    # lr=0: the same work, and weight stays what was checked.
    optimizer = torch.optim.Adam([inputs.weight, inputs.bias], lr=0.0, fused=True) if case.mode == "adam" else None
    with torch_mode(case):
        return run_rows(case, inputs, functions, lambda _, function: prepare(case, inputs, function, truths, optimizer))


def run_training_case(case: Case, inputs: training.TrainingInputs, package) -> list[dict]:
    """The rows of a training step."""
    optimizer = training.make_optimizer(case, inputs)
    with torch_mode(case):
        functions = training.implementations(case, inputs, package, optimizer)
        prepare = functools.partial(training.prepare, case, inputs, optimizer)
        return run_rows(case, inputs, functions, prepare)


def run_decode_case(case: Case, inputs: Inputs, package) -> list[dict]:
    """The rows of the decode. Dense products are in TF32, as in training."""
    made = decode.DecodeInputs(inputs)
    torch.set_float32_matmul_precision("high")
    try:
        functions = decode.implementations(case, made, package)
        return run_rows(case, made, functions, functools.partial(decode.prepare, case, made))
    finally:
        torch.set_float32_matmul_precision("highest")


def release(inputs) -> None:
    """Drop gradients and what reference cycles, as those of an error, keep alive."""
    inputs.clear()
    gc.collect()
    torch.cuda.empty_cache()


def describe(record: dict) -> str:
    """A record in one line."""
    kind = "{precision:8} {optimizer:7}" if "precision" in record else "{dtype:8} {distribution:7}"
    line = ("{loss:12} {mode:14} {B:5} {K:3} {F:6} {D:4} " + kind + " {row:13}").format(**record)
    if record["status"] != "ok":
        return f"{line} {record['status']} {record.get('detail', '')}"
    memory = f" {record['total_gib']:6.2f} GiB" if "total_gib" in record else ""
    memory += f" {record['extra_gib']:6.2f} GiB extra" if "extra_gib" in record else ""
    return f"{line} {record['ms']:8.3f} ms {record['wall_ms']:8.3f} ms on the wall{memory}"


def run(cases: list[Case], package, baselines: dict, out: Path | None) -> bool:
    """Run the cases and append their records to `out`; says whether every row of the package is right. The cases of a
    shape stand together and share inputs and truths."""
    right = True
    with tqdm(total=len(cases), unit="case", disable=None) as progress:
        for shape, group in itertools.groupby(cases, key=lambda case: case.shape):
            inputs, truths = None, {}
            for case in group:
                functions = implementations(case, package, baselines) if case.loss and not case.precision else {}
                try:
                    if case.precision:
                        inputs = inputs or training.TrainingInputs(shape)
                        lines = run_training_case(case, inputs, package)
                    else:
                        inputs = inputs or Inputs(shape)
                        if case.mode == "decode":
                            lines = run_decode_case(case, inputs, package)
                        elif case.mode == "nested":
                            functions = nested.implementations(case, package)
                            lines = run_rows(case, inputs, functions, functools.partial(nested.prepare, case, inputs))
                        else:
                            if case.loss not in truths:
                                truths[case.loss] = inputs.truths(case.loss)
                            lines = run_case(case, inputs, functions, truths[case.loss])
                except torch.OutOfMemoryError as error:  # what all rows share does not fit
                    lines = [{**blank(case, row), **failure(error)} for row in functions or case.rows]
                if out:
                    records.append(out, lines)
                for line in lines:
                    progress.write(describe(line))
                    own = line["row"].startswith("flex_sae") or case.mode in ("parts", "auxk")
                    right = right and (not own or line["status"] == "ok")
                progress.update()
            del inputs, truths
            torch.cuda.empty_cache()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time the losses and training steps of this checkout beside other ways to compute them."
    )
    parser.add_argument("--suite", choices=SUITES, required=True, help="what to run")
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME=PATH", help="also time this code")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; keeps no file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (default: benchmarks/results/SUITE.jsonl)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU that torch.cuda can see, and there is none here.", file=sys.stderr)
        sys.exit(2)

    # One compiled reference a shape, and a suite has more shapes than torch's limit of 8.
    torch._dynamo.config.recompile_limit = 1000
    cases, baselines, package = SUITES[args.suite](), load_baselines(args.baseline), load_package()
    if args.quick:
        cases = [quick(case) for case in cases]
    out = args.out or (None if args.quick else records.RESULTS / f"{args.suite}.jsonl")
    if out:
        options = [f"--baseline {name}=PATH" for name in baselines] + ["--quick"] * args.quick
        command = " ".join(["python benchmarks/run.py --suite", args.suite, *options])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        records.append(out, [records.environment(command)])
    if not run(cases, package, baselines, out):
        sys.exit("The package gave a wrong result, failed or ran out of memory; see above.")


if __name__ == "__main__":
    main()

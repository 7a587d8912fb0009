"""What benchmarks/run.py takes for right before it times it, and what it keeps when something fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_run", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def prepare(bench, flex, monkeypatch):
    """A function that checks a loss made of the reference by `change(loss, i)`, for set i, on a CPU."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "measure_memory", lambda *args: {})

    def prepare(loss, mode="step", change=lambda function, i, *inputs: function(*inputs), dtype="float32"):
        shape = bench.Shape(B=24, K=4, F=32, D=16, dtype=dtype)
        inputs = bench.Inputs(shape)
        function = getattr(flex, f"{loss}_sae_loss")

        def changed(indices, *others):
            i = next(i for i, (known, *_) in enumerate(inputs.sets) if known is indices)
            return change(function, i, indices, *others)

        with torch.set_grad_enabled(mode != "forward"):
            record, _ = bench.prepare_row(
                bench.Case(shape, loss, mode), inputs, changed, bench.truth(loss, inputs), None
            )
        return record["errors"]

    return prepare


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("loss", ["topk", "hierarchical"])
def test_what_is_right_is_timed(prepare, loss, mode, dtype):
    errors = prepare(loss, mode, dtype=dtype)
    assert errors.keys() == ({"loss"} if mode == "forward" else {"loss", "weight", "vals", "bias"})


def no_gradient_of_bias(function, i, indices, weight, vals, bias, target):
    return function(indices, weight, vals, bias.detach(), target)


def another_loss_of_the_last_set(function, i, *inputs):
    return function(*inputs) * (1.001 if i == 2 else 1)


def a_pair_less(function, i, indices, weight, vals, bias, target):
    """The right value, and the gradient of weight without one of the pairs of a feature."""
    mask = torch.ones_like(vals)
    mask[0, -1] = 0
    value = function(indices, weight, vals, bias, target)
    others = function(indices, weight.detach(), vals, bias, target)
    partial = function(indices, weight, (vals * mask).detach(), bias.detach(), target)
    return others + (partial - partial.detach()) + (value - others).detach()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (no_gradient_of_bias, "bias has no gradient"),
        (another_loss_of_the_last_set, "loss is off"),
        (a_pair_less, "weight is off"),
    ],
)
@pytest.mark.parametrize("loss", ["topk", "hierarchical"])
def test_what_is_wrong_is_not_timed(bench, prepare, loss, change, complaint):
    with pytest.raises(bench.ParityError, match=complaint):
        prepare(loss, change=change)


def test_a_row_that_is_off_does_not_drown_in_the_others(bench):
    got = torch.randn(10_000, 8)
    want = {"weight": got.double()}
    bound = 0.02
    assert bench.check({"weight": got}, want, bound) == {"weight": 0}
    got[7] = 0  # a hundredth of the whole
    with pytest.raises(bench.ParityError, match="off in 1 rows, the first is 7"):
        bench.check({"weight": got}, want, bound)


def test_an_interruption_loses_no_results(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "environment", lambda command: {"command": command})
    file = tmp_path / "new" / "results.json"
    results = bench.Results("small", "python benchmarks/run.py", file)
    for n in range(2):
        results.add([{"n": n}])
        records = [{"n": i} for i in range(n + 1)]
        assert json.loads(file.read_text()) == {
            "suite": "small",
            "command": "python benchmarks/run.py",
            "records": records,
        }
    assert list(file.parent.iterdir()) == [file]


def test_what_fails_while_it_is_timed_becomes_a_status(bench, flex, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "sample", fails)
    shape = bench.Shape(B=24, K=4, F=32, D=16)
    inputs = bench.Inputs(shape)
    functions = {"flex_sae": flex.topk_sae_loss, "broken": None}
    monkeypatch.setattr(bench, "measure_memory", lambda *args: {})
    records = bench.run_case(
        bench.Case(shape, "topk", "step"), inputs, functions, bench.truth("topk", inputs), ceilings={}
    )
    assert [(record["row"], record["status"]) for record in records] == [
        ("flex_sae", "out of memory"),
        ("broken", "failed"),
    ]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["no/such/folder"], "neither a folder nor a Python file"),
        (["flex_sae={file}"], "another row is called flex_sae"),
        (["a={file}", "a={file}"], "another row is called a"),
    ],
)
def test_a_baseline_that_is_no_row_is_refused(bench, tmp_path, arguments, complaint):
    file = tmp_path / "x=y" / "losses.py"
    file.parent.mkdir()
    file.write_text("def triton_topk_sae_loss(): ...\n")
    assert list(bench.load_baselines([f"a={file}", str(file)])) == ["a", "losses"]
    with pytest.raises(SystemExit, match=complaint):
        bench.load_baselines([argument.format(file=file) for argument in arguments])

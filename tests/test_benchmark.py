"""What is right is timed, what is wrong is not, nothing measured is lost, and reports show what was measured."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import budgets
import cases
import inputs
import measure
import nested
import peers
import records
import run
import training
import training_check

BENCHMARKS = Path(run.__file__).parent
SHAPE = cases.Shape(B=24, K=4, F=32, D=16)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "memory", lambda *args: {"total_gib": 2.0, "extra_gib": 0.5})
    monkeypatch.setattr(measure, "times", lambda steps: {name: {"ms": 1.0, "wall_ms": 2.0} for name in steps})


def row_of(case, function):
    """The record of `function` as the only row of a case."""
    made = inputs.Inputs(case.shape)
    (record,) = run.run_case(case, made, {"row": function}, made.truths(case.loss))
    return record


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["step", "adam", "deterministic", "one thread"])
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_what_is_right_is_timed(flex, loss, mode, dtype):
    case = cases.Case(cases.Shape(24, 4, 32, 16, dtype, "zipf"), loss, mode)
    record = row_of(case, getattr(flex, f"{loss}_sae_loss"))
    assert (record["status"], record["ms"], record["wall_ms"]) == ("ok", 1.0, 2.0)
    assert 0 < record["error"] < inputs.bounds(case)[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_peers_compute_the_loss(flex, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # there may be no C compiler
    peers.compiled.cache_clear()
    case = cases.Case(SHAPE, "topk", "step", cases.PEERS["topk"])
    functions = peers.implementations(case, flex, {})
    assert list(functions) == ["flex_sae", *case.peers]
    assert [row_of(case, functions[name])["status"] for name in case.peers] == ["ok"] * len(case.peers)


def another_gradient(name):
    def change(function, _, problem):
        tensor = getattr(problem, name)
        return function(*problem._replace(**{name: 1.001 * tensor - 0.001 * tensor.detach()}))

    return change


@pytest.mark.parametrize(
    "change, status, detail",
    [
        (lambda f, _, p: f(*p._replace(bias=p.bias.detach())), "wrong", "bias has no gradient"),
        # The losses of all sets are checked, the gradients of set 0.
        (lambda f, call, p: f(*p) * (1.001 if call == 3 else 1), "wrong", "loss of set 2 is off by 1.0e-03"),
        (lambda f, _, p: f(*p) * float("nan"), "wrong", "loss of set 0 is off by nan"),
        *((another_gradient(n), "wrong", f"{n} of set 0 is off by 1.0e-03") for n in ("weight", "vals", "bias")),
        (lambda f, _, p: f(*p[:-1]), "failed", "missing 1 required positional argument: 'target'"),
    ],
)
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_what_is_wrong_is_not_timed(flex, loss, change, status, detail):
    calls = []

    def changed(*problem):
        calls.append(problem)
        return change(getattr(flex, f"{loss}_sae_loss"), len(calls), inputs.Problem(*problem))

    record = row_of(cases.Case(SHAPE, loss), changed)
    assert record["status"] == status and detail in record["detail"]
    assert "ms" not in record


def test_a_lost_row_among_many_and_other_bits_are_seen():
    case, weight = cases.Case(cases.Shape(24, 4, 2000, 8, "bfloat16"), "topk"), torch.randn(2000, 8)
    weight[7] *= 1e-2
    truths = [{"weight": weight.double()}]
    assert inputs.check(case, lambda i: {"weight": weight.clone()}, truths) == 0
    weight[7] = 0
    with pytest.raises(inputs.ParityError, match="off in 1 rows, the first is 7"):
        inputs.check(case, lambda i: {"weight": weight}, truths)
    with pytest.raises(inputs.ParityError, match="loss differs"):
        inputs.check_repeats(lambda i: {"loss": torch.rand(())})


TRAINING_SHAPE = cases.Shape(B=24, K=4, F=64, D=16)


def training_records(package, loss, mode, peers=(), precision="TF32", optimizer="fused"):
    """The records of a training case, with steps that have run."""
    case = cases.Case(TRAINING_SHAPE, loss, mode, peers, precision, optimizer)
    return run.run_training_case(case, training.TrainingInputs(case.shape), package)


@pytest.fixture
def timed(monkeypatch):
    """Steps run on every set when they are timed, and are not captured or compiled."""

    def times(steps):
        for step in steps.values():
            for i in range(inputs.SETS):
                step(i)
        return {name: {"ms": 1.0, "wall_ms": 2.0} for name in steps}

    monkeypatch.setattr(measure, "times", times)
    monkeypatch.setattr(measure, "capture", lambda step: step)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture(scope="module")
def in_torch(flex):
    """The package with its references as kernels: fast, and they round to bfloat16 as a GPU does."""
    references = {name: getattr(flex, name) for name in ("topk_encode", "topk_sae_loss", "hierarchical_sae_loss")}
    return SimpleNamespace(**references, **{f"triton_{name}": reference for name, reference in references.items()})


@pytest.mark.parametrize("precision", ["float32", "TF32", "autocast"])
@pytest.mark.parametrize(
    "loss, mode, peers, optimizer",
    [
        *((loss, "training", cases.TRAINING_PEERS, "fused") for loss in cases.LOSSES),
        ("hierarchical", "training", (), "default"),
        ("topk", "training graph", (), "fused"),
        ("", "encoder", cases.TRAINING_PEERS[1:], "fused"),
    ],
)
def test_training_steps_that_are_right_are_timed(in_torch, timed, loss, mode, peers, precision, optimizer):
    records = training_records(in_torch, loss, mode, peers, precision, optimizer)
    assert [r["row"] for r in records] == ["flex_sae", *peers]
    for record in records:
        assert (record["status"], record["ms"], record["precision"]) == ("ok", 1.0, precision), record
        assert record["error"] < (0.01 if precision == "autocast" else 1e-6)
        assert ("total_gib" in record, "extra_gib" in record) == (mode == "training", mode != "training graph")
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_parts_of_a_training_step_are_timed(flex, timed, device, monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", device)  # of kernels, not of the references
    records = training_records(flex, "topk", "parts")
    assert [(r["row"], r["status"]) for r in records] == [(part, "ok") for part in cases.PARTS]


def test_auxk_is_timed(in_torch, timed):
    records = training_records(in_torch, "", "auxk")
    assert [(r["row"], r["status"], "ms" in r) for r in records] == [(row, "ok", True) for row in cases.AUXK]


def test_every_way_to_decode_is_right(flex, timed, device, monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", device)
    case = cases.Case(SHAPE, "", "decode", cases.DECODE_PEERS)
    records = run.run_decode_case(case, inputs.Inputs(SHAPE), flex)
    assert [(r["row"], r["status"]) for r in records] == [(row, "ok") for row in case.rows]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_wrong_decode_is_not_timed(flex, timed, device, monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", device)
    wrong = SimpleNamespace(triton_sae_decode=lambda *pairs: 1.001 * flex.sae_decode(*pairs))
    (record,) = run.run_decode_case(cases.Case(SHAPE, "", "decode"), inputs.Inputs(SHAPE), wrong)
    assert record["status"] == "wrong" and "recon is off by 1.0e-03" in record["detail"]


def test_nested_losses_that_are_right_are_timed(flex, timed, device, monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", device)
    shape = cases.Shape(B=6, K=10, F=32, D=16)
    (case, *_) = (replace(case, shape=shape) for case in cases.nested())
    made, functions = inputs.Inputs(shape), nested.implementations(case, flex)
    records = run.run_rows(case, made, functions, partial(nested.prepare, case, made))
    assert [(r["row"], r["status"]) for r in records] == [(row, "ok") for row in cases.NESTED]
    loss, ends = functions["flex_sae, L=5"]
    wrong = {"wrong": (lambda *arguments: 1.001 * loss(*arguments), ends)}
    (record,) = run.run_rows(case, made, wrong, partial(nested.prepare, case, made))
    assert record["status"] == "wrong" and "off by 1.0e-03" in record["detail"]


def biased(encode, scale):
    """An encoder whose vals have `scale` times the gradient."""

    def changed(x, weight, bias, k):
        vals, indices = encode(x, weight, bias, k)
        return scale * vals + (1 - scale) * vals.detach(), indices

    return changed


def other_features(encode, x, weight, bias, k):
    """The features on ranks 2 to k + 1."""
    vals, indices = encode(x, weight, bias, k + 1)
    return vals[:, 1:], indices[:, 1:]


@pytest.mark.parametrize("precision", ["TF32", "autocast"])
@pytest.mark.parametrize(
    "change, detail",
    [
        (lambda encode: biased(encode, 1.05), "encoder is off by 5"),
        (lambda encode: lambda *args: other_features(encode, *args), "miss a larger feature"),
        (lambda encode: lambda x, w, b, k: (lambda v, i: (v * 1.5, i))(*encode(x, w, b, k)), "vals are off by"),
        (lambda encode: lambda x, w, b, k: (lambda v, i: (v, i * 0))(*encode(x, w, b, k)), "a feature twice"),
        (lambda encode: lambda x, w, b, k: encode(x, w, b.detach(), k), "encoder_bias has no gradient"),
        (lambda encode: lambda x, w, b, k: encode(x.detach(), w, b, k), "bias is off by"),
    ],
)
def test_a_wrong_encoder_is_not_timed(in_torch, timed, change, detail, precision):
    package = SimpleNamespace(**{**vars(in_torch), "triton_topk_encode": change(in_torch.topk_encode)})
    (record,) = training_records(package, "topk", "training", (), precision)
    assert record["status"] == "wrong" and detail in record["detail"], record
    assert "ms" not in record


def test_a_wrong_loss_of_a_training_step_is_not_timed(in_torch, timed):
    for change, detail in [
        (lambda *args: in_torch.topk_sae_loss(*args) * 1.001, "loss is off by 1.0e-03"),
        (lambda i, w, *others: in_torch.topk_sae_loss(i, w.detach(), *others), "decoder has no gradient"),
    ]:
        package = SimpleNamespace(**{**vars(in_torch), "triton_topk_sae_loss": change})
        (record,) = training_records(package, "topk", "training")
        assert record["status"] == "wrong" and detail in record["detail"], record


def test_a_lost_row_of_a_gradient_is_seen():
    expected = torch.randn(2000, 8, dtype=torch.float64)
    got = expected.float()
    assert training_check.compare("encoder", got, expected, 0.1) < 1e-6
    got[7] = 0
    with pytest.raises(inputs.ParityError, match="encoder is off in 1 rows, the first is 7"):
        training_check.compare("encoder", got, expected, 0.1)


def test_an_interruption_loses_no_results(flex, tmp_path, monkeypatch):
    def interrupted(case, *others):
        if case.loss == "hierarchical":
            raise KeyboardInterrupt
        return [{**run.blank(case, "flex_sae"), **run.failure(torch.OutOfMemoryError())}]

    monkeypatch.setattr(run, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run([cases.Case(SHAPE, loss) for loss in cases.LOSSES], flex, {}, tmp_path / "results.jsonl")
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (record["loss"], record["status"], record["B"]) == ("topk", "out of memory", 24)


def test_baselines_are_files_and_folders_of_other_names(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/losses.py").write_text("def triton_topk_sae_loss(): return 'ours'")
    (tmp_path / "package/__init__.py").write_text("from .losses import triton_topk_sae_loss")
    file, empty = tmp_path / "x=y.py", tmp_path / "empty.py"
    file.write_text("def triton_hierarchical_sae_loss(): ...")
    empty.touch()
    baselines = peers.load_baselines([f"a={tmp_path / 'package'}", f"b={file}"])
    assert baselines["a"].triton_topk_sae_loss() == "ours"
    assert hasattr(baselines["b"], "triton_hierarchical_sae_loss")
    for arguments, complaint in [
        (["no/such/folder"], "expected NAME=PATH"),
        (["a=no/such/folder"], "neither a Python file nor a folder"),
        ([f"a={empty}"], "has neither triton_topk_sae_loss nor"),
        ([f"flex_sae={file}"], "another row is called flex_sae"),
        ([f"a={file}", f"a={file}"], "another row is called a"),
    ]:
        with pytest.raises(SystemExit, match=complaint):
            peers.load_baselines(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run([sys.executable, BENCHMARKS / "run.py", "--suite", "small"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "This benchmark needs a GPU that torch.cuda can see, and there is none here.\n"


@pytest.mark.parametrize(
    ("name", "alone"), [("TopKBenchmark", "loss"), ("HierarchicalBenchmark", "loss"), ("EncoderBenchmark", "encode")]
)
def test_the_benchmark_of_the_hub_verifies(flex, device, name, alone):
    benchmark = runpy.run_path(BENCHMARKS / "benchmark.py")[name]()
    benchmark.kernel, benchmark.device = flex, device
    if device == "cpu":
        with pytest.raises(RuntimeError, match="needs a GPU: on a CPU the functions are their torch references"):
            benchmark.setup()
    benchmark.make_inputs(B=32, K=4, F=64, D=48)
    for workload in (alone, "step"):
        getattr(benchmark, f"benchmark_{workload}")()
        # The tolerance of `kernels benchmark`
        assert torch.allclose(benchmark.out, getattr(benchmark, f"verify_{workload}")(), atol=1e-2)


def report(folder, text, *options):
    """Run report.py on a document of `text` and the results in `folder`: its exit code, stderr and the document."""
    for library in ("tabulate", "matplotlib"):
        pytest.importorskip(library)
    document = folder / "README.md"
    document.write_text(text)
    command = [sys.executable, BENCHMARKS / "report.py", *options, "--results", folder, document]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr, document.read_text()


def write_results(folder, suite, **about):
    """Made-up results of a suite: 2 ms and 4 GiB for the package, 10 ms and 20 GiB for its peers, under autocast half
    the time for the package."""
    lines = [{"command": "run", "gpu": "Some GPU", "torch": "2", "triton": "3", "commit": "abc", **about}]
    for case in cases.SUITES[suite]():
        for row in case.rows:
            ms, gib = (2.0, 4.0) if row == "flex_sae" else (10.0, 20.0)
            if case.precision == "autocast" and row == "flex_sae":
                ms /= 2
            measured = {"status": "ok", "ms": ms, "wall_ms": ms + 0.5, "total_gib": gib, "extra_gib": gib / 8}
            too_large = row == "dense" or (row == "torch eager" and case.shape.D == 4096)
            lines.append({**run.blank(case, row), **({"status": "out of memory"} if too_large else measured)})
    records.append(folder / f"{suite}.jsonl", lines)


def write_budgets(folder):
    """Made-up results of budgets.py: what it makes of the runs of two comparisons."""
    lines = [{"command": "budgets", "gpu": "Some GPU", "torch": "2", "triton": "3", "commit": "abc"}]
    for data, recovered in (("synthetic", 0.5), ("activations", None)):
        for name in ("hierarchical", "topk-8", "topk-16"):
            out = folder / data / name
            out.mkdir(parents=True)
            found = {} if recovered is None else {"recovered": recovered + (name == "topk-8") / 4}
            explained = {"8": 0.25 if name == "topk-16" else 0.75, "16": 0.875}
            (out / "results.json").write_text(json.dumps({"explained_variance": explained, "dead": 0, **found}))
        lines += [{"data": data, **record} for record in budgets.curves(folder / data)]
    records.append(folder / "budgets.jsonl", lines)


def marked(name):
    return f"before\n<!-- table:{name} -->\nstale\n<!-- /table -->\nafter\n"


CELLS = {
    "training": [
        *("2.00, 4.0", "10.0 (5.0x), 20.0"),
        *("1.00, 4.0", "10.0 (10.0x), 20.0", "out of memory"),
    ],
    "training_topk": ["TF32", "2.00, 4.0"],
    "training_parts": ["10.0 ms (25%)", "0.000 ms (0%)", "HierarchicalTopK"],
    "training_graph": ["TopK", "2.00 ms", "2.50 ms"],
    "training_defaults": ["float32", "default", "fused", "2.00 ms", "4.0 GiB"],
    "encoder": ["24576", "10.0 ms, 2.50 GiB", "out of memory"],
    "decoder_step": ["TopK", "128", "2.00 ms, 4.0 GiB, 5.0x faster", "10.0 ms, 20.0 GiB"],
    "losses": ["65536", "zipf", "flex_sae, deterministic", "2.00 ms", "2.50 ms", "out of memory"],
    "sizes": ["1023", "262144", "2.00 ms", "2.50 ms"],
    "small": ["eager, one thread", "CUDA graph", "embedding_bag", "10.5 ms"],
    "memory": ["4096", "131072", "0.50 GiB"],
    "decode": ["flex_sae, TopK loss", "flex_sae, Zipf rows", "torch.sparse", "2.00 ms, 0.50 GiB", "10.0 ms, 2.50 GiB"],
    "nested": ["HierarchicalTopK", "5 masked decodes", "10.0 ms (5.00x), 2.50 GiB", "2.00 ms, 0.50 GiB"],
    "budgets": ["TopK, an SAE for each k", "50% to 75%", "50%", "unknown", "0.250", "0.750", "0.875"],
    "auxk": ["24576", "autocast", "10.0 ms (500%)", "10.0 ms (1000%)"],
}


def test_a_report_has_the_tables_and_the_plots(tmp_path):
    for suite in cases.SUITES:
        write_results(tmp_path, suite)
    write_budgets(tmp_path)
    code, printed, text = report(tmp_path, "".join(map(marked, CELLS)))
    assert (code, printed) == (0, "")
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert text.count("<sub>`run` on Some GPU, torch 2, triton 3, commit abc</sub>") == len(CELLS) - 1
    assert text.count("<sub>`budgets` on Some GPU, torch 2, triton 3, commit abc</sub>") == 1
    tables = {name: text.split(f"<!-- table:{name} -->")[1].split("<sub>")[0] for name in CELLS}
    for name, cells in CELLS.items():
        assert all(f"| {cell} " in tables[name] for cell in cells), tables[name]
    lines = {"training": 6, "training_parts": 12, "training_graph": 12, "training_defaults": 4, "encoder": 6}
    for name, count in {
        **lines,
        "auxk": 6,
        "decode": 8,
        "nested": 7,
        "budgets": 6,
        "decoder_step": 6,
        "memory": 3,
    }.items():
        assert tables[name].count("\n|") == 2 + count, tables[name]
    drawn = (tmp_path / "training.svg").read_text()
    assert "<!-- peak memory (GiB) -->" in drawn and drawn.count("out of memory") == 4
    drawn = (tmp_path / "budgets.svg").read_text()
    assert "<!-- explained variance, held-out -->" in drawn and "<!-- synthetic -->" in drawn
    assert report(tmp_path, text, "--check") == (0, "", text)
    code, printed, _ = report(tmp_path, text.replace("2.50 ms", "2.49 ms", 1), "--check")
    assert (code, printed) == (1, "Not the tables of the results: README.md.\n")


def test_the_headline_is_a_training_step(tmp_path):
    write_results(tmp_path, "training")
    code, printed, text = report(tmp_path, marked("headline"))
    assert (code, printed) == (0, "")
    assert "of B=4096 K=64 F=65536 D=2304 in TF32\ntakes 2.00 ms and 4.0 GiB; 10.0 ms and 20.0 GiB with torch" in text


@pytest.mark.parametrize(
    "text, complaint",
    [
        (marked("nothing"), "There is no table nothing"),
        (marked("sizes"), "sizes.jsonl is missing"),
        (marked("decoder_step") + "<!-- table:small -->", "has no <!-- /table --> of its own"),
        (marked("decoder_step") + marked("small"), "commit is abc in decoder_step.jsonl and def in small.jsonl"),
    ],
)
def test_a_report_is_refused_in_one_sentence(tmp_path, text, complaint):
    write_results(tmp_path, "decoder_step")
    write_results(tmp_path, "small", commit="def")
    code, printed, unchanged = report(tmp_path, text)
    assert code == 2 and complaint in printed and printed.count("\n") == 1
    assert unchanged == text

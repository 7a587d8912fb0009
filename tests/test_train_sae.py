"""examples/train_sae.py: what a run learns, what it survives, what it refuses, and what it leaves behind."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sae as model
import torch
import train_sae
from safetensors.torch import load_file
from support import INTERPRETED
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

# from reading a checkpoint in a single process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

SCRIPT = Path(train_sae.__file__)
# Tiny, with features that die at once, so that AuxK is at work
SIZES = "-B 32 -K 4 -F 96 -D 16 --features 24 --active 2 --lr 3e-3 --dead-after 32 --seed 3"
LOSSES = {"topk": "--loss topk", "hierarchical": "--loss hierarchical --deterministic", "nested": "--levels 2,4"}


class StopAt(contextlib.nullcontext):
    """As if SIGTERM had come in this step."""

    def __init__(self, step: int | None = None):
        super().__init__()
        self.step, self.signal = step, 0

    def ask(self, done: int) -> int:
        self.signal = signal.SIGTERM if done == self.step else 0
        return self.signal


UNSTOPPED = StopAt()


@pytest.fixture(scope="module")
def package(flex):
    """What a training run on this machine uses: without a GPU the plain torch references, not the interpreter."""
    names = ("topk_encode", "topk_sae_loss", "hierarchical_sae_loss", "nested_sae_loss", "sae_decode")
    return SimpleNamespace(**{f"triton_{name}": getattr(flex, name) for name in names}) if INTERPRETED else flex


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Runs refresh the dead features and write metrics often, and leave no setting of torch behind."""
    monkeypatch.setattr(train_sae, "REFRESH_EVERY", 4)
    monkeypatch.setattr(train_sae, "LOG_EVERY", 5)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    stream = None if INTERPRETED else torch.cuda.current_stream()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_float32_matmul_precision(before[1])
    if stream:
        torch.cuda.set_stream(stream)


def parse(out: Path, *arguments: str):
    return train_sae.parse_options(["--out", str(out), *SIZES.split(), *" ".join(arguments).split()])


def run(package, out: Path, *arguments: str, stop=UNSTOPPED) -> dict:
    options = parse(out, *arguments)
    return train_sae.run(options, package, train_sae.start(options), stop)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint: parameters, buffers, Adam's moments."""
    (name,) = checkpoints(out)
    folder = out / "checkpoints" / name
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    loaded = _load_state_dict_from_keys(set(keys), checkpoint_id=folder)
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", loaded)
    assert len(flat) > 4 * 3  # four parameters, and of each the moments and the step of Adam
    return flat


def assert_same_run(got: Path, wanted: Path) -> None:
    one, other = state(got), state(wanted)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert metrics(got) == metrics(wanted)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def start_process(*command: str | Path, **env: str) -> subprocess.Popen:
    """Python, as a user would start it."""
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)


# Learning


def test_a_run_finds_the_true_features(package, tmp_path):
    results = run(package, tmp_path, "--steps 600 -F 48 --active 1 -K 2 --dead-after 3200")
    # Each sample is a multiple of one true feature, so that one active feature is enough.
    assert min(results["explained_variance"].values()) > 0.9
    assert results["recovered"] > 0.5
    assert (tmp_path / "explained_variance.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_data_are_scaled_and_centred_before_the_first_step(package, tmp_path):
    options = parse(tmp_path)
    device = train_sae.start(options)
    x = 7 * torch.randn(4096, 16, device=device) + 3
    sae = model.SAE(options, 16, package, device)
    sae.fit_to(x.norm(dim=1).mean(), x.mean(0))
    scaled = x * sae.scale
    assert scaled.norm(dim=1).mean().item() == pytest.approx(4, rel=1e-5)
    torch.testing.assert_close(sae.bias.detach(), scaled.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.encoder.weight, sae.decoder.weight)


def new_sae(package, tmp_path, *arguments: str):
    options = parse(tmp_path, *arguments)
    device = train_sae.start(options)
    torch.set_float32_matmul_precision("highest")
    sae = model.SAE(options, 16, package, device)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).to(device)
    sae.fit_to(x.norm(dim=1).mean(), x.mean(0))
    with torch.no_grad():  # untied, so that a mix-up of the two shows
        sae.encoder.weight += 0.1 * torch.randn(96, 16, generator=torch.Generator().manual_seed(1)).to(device)
        sae.encoder.bias += 0.1 * torch.randn(96, generator=torch.Generator().manual_seed(2)).to(device)
    return sae, x


def gradients(loss: torch.Tensor, sae) -> dict[str, torch.Tensor]:
    parameters = dict(sae.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [3, 64, 90], ids=lambda n: f"{n}_dead")  # padded, all of the list, all features listed
def test_auxk_adds_the_gradients_of_its_definition(package, tmp_path, loss, n):
    sae, x = new_sae(package, tmp_path, LOSSES[loss], "--auxk-coefficient 0.5")
    main = gradients(sae(x)[0], sae)
    dead = torch.randperm(96, generator=torch.Generator().manual_seed(4))[:n].to(x.device)
    sae.dead[:n] = dead
    assert sae.fit_capacity() == n
    got = gradients(sae(x)[0], sae)

    # In float64, over all features: those that are not dead have codes of zero.
    encoder, bias, decoder, pre_bias = (
        tensor.detach().double().requires_grad_()
        for tensor in (sae.encoder.weight, sae.encoder.bias, sae.decoder.weight, sae.bias)
    )
    with torch.no_grad():
        scaled = (x * sae.scale)[::4]
        vals, indices = package.triton_topk_encode(scaled - sae.bias, sae.encoder.weight, sae.encoder.bias, sae.K)
        residual = scaled - package.triton_sae_decode(indices, sae.decoder.weight, vals, sae.bias)
    is_dead = torch.zeros(96, dtype=torch.bool, device=x.device).index_fill(0, dead, True)
    pre = ((scaled - pre_bias.detach()).double() @ encoder.t() + bias).masked_fill(~is_dead, -torch.inf)
    top = pre.topk(min(8, n), dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    aux = 0.5 * (codes @ decoder - residual).square().mean()
    wanted = torch.autograd.grad(aux, (encoder, bias, decoder))
    for name, added in zip(("encoder.weight", "encoder.bias", "decoder.weight"), wanted, strict=True):
        assert added.norm() > 0
        # Sums of at most 96 products in float32, of gradients that are at most 100 times as large as what is added.
        torch.testing.assert_close(got[name] - main[name], added.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(got["bias"], main["bias"])


@pytest.mark.parametrize("loss", LOSSES)
def test_auxk_changes_no_bit_while_no_feature_is_dead(package, tmp_path, loss):
    sae, x = new_sae(package, tmp_path, LOSSES[loss])
    assert sae.refresh_dead(dead_after=0) == 0
    without = gradients(sae(x)[0], sae)
    sae.capacity = 64  # AuxK on padding alone
    with_auxk = gradients(sae(x)[0], sae)
    assert all(torch.equal(with_auxk[name], without[name]) for name in without)


def test_features_are_dead_after_their_last_firing_only(package, tmp_path):
    sae, x = new_sae(package, tmp_path, "-K 1")
    for _ in range(3):
        sae(x)
    fired = sae.last_fired == 3
    assert sae.refresh_dead(dead_after=2) == int((~fired).sum()) > 0
    assert sorted(sae.dead[sae.dead >= 0].tolist()) == (~fired).nonzero().squeeze(1).tolist()
    assert sae.refresh_dead(dead_after=3) == 0


def test_decoder_rows_keep_length_one_and_get_no_gradient_along_themselves(package, tmp_path):
    sae, x = new_sae(package, tmp_path)
    trainer = train_sae.Trainer(sae, parse(tmp_path, "--no-graph"))
    before = sae.decoder.weight.detach().clone()
    trainer(x, 1e-2)
    # What Adam saw is still there.
    along = (sae.decoder.weight.grad * before).sum(1).abs()
    assert (along <= 1e-5 * sae.decoder.weight.grad.norm(dim=1)).all()
    assert not torch.equal(before, sae.decoder.weight)
    torch.testing.assert_close(sae.decoder.weight.norm(dim=1), torch.ones(96, device=x.device), rtol=1e-6, atol=0)


def test_the_learning_rate_rises_and_falls(tmp_path):
    options = parse(tmp_path, "--steps 100 --warmup 10 --lr 1")
    rates = [train_sae.learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(rates[10:80]) == {1}
    assert rates[80:] == pytest.approx([1 - 0.05 * i for i in range(20)])
    options.warmup = 0.1
    assert rates == [train_sae.learning_rate(step, options) for step in range(100)]


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_cuda_graph_gives_the_bits_of_eager_steps(package, tmp_path, loss):
    arguments = f"--steps 60 --checkpoint-every 60 --deterministic {LOSSES[loss]}"
    run(package, tmp_path / "graph", arguments)
    run(package, tmp_path / "eager", arguments, "--no-graph")
    assert len({line["dead"] for line in metrics(tmp_path / "graph")}) > 1
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


# Interruptions


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_run_continues_bit_for_bit(package, tmp_path, loss):
    arguments = f"--steps 40 --checkpoint-every 15 {LOSSES[loss]}"
    run(package, tmp_path / "whole", arguments)
    for step in (7, 22):  # between two checkpoints, two refreshes and two lines of metrics
        with pytest.raises(SystemExit) as ended:
            run(package, tmp_path / "parts", arguments, "--resume", stop=StopAt(step))
        assert ended.value.code == 143
        assert checkpoints(tmp_path / "parts") == [f"step-{step:08}"]
    run(package, tmp_path / "parts", arguments, "--resume")
    assert {line["dead"] for line in metrics(tmp_path / "whole")} != {0}
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_is_killed_at_any_moment_continues_bit_for_bit(package, tmp_path, monkeypatch):
    arguments = "--steps 2000 --loss topk --deterministic"
    out, moments, last = tmp_path / "killed", random.Random(0), 0
    for _ in range(2):
        process = start_process(SCRIPT, "--out", out, "--resume", *SIZES.split(), *arguments.split(),
                                "--checkpoint-every", "1")  # fmt: skip
        while not (out / "checkpoints").exists() or max(map(step_of, checkpoints(out)), default=0) <= last + 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.2 * moments.random())
        process.kill()
        process.communicate()
        last = max(map(step_of, checkpoints(out)))
    monkeypatch.setattr(train_sae, "REFRESH_EVERY", 100)
    monkeypatch.setattr(train_sae, "LOG_EVERY", 50)
    for folder in (out, tmp_path / "whole"):
        with pytest.raises(SystemExit):
            run(package, folder, arguments, "--resume", stop=StopAt(last + 60))
    assert_same_run(out, tmp_path / "whole")


def step_of(checkpoint: str) -> int:
    """0 for one that is not complete."""
    return 0 if checkpoint.endswith(".part") else int(checkpoint.removeprefix("step-"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint_of_its_step(package, tmp_path, monkeypatch, number, code):
    batch = train_sae.Synthetic.batch

    def interrupted(data, step):
        if step == 8:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as of a launcher that passes it on
        return batch(data, step)

    monkeypatch.setattr(train_sae.Synthetic, "batch", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run(package, tmp_path, "--steps 30", stop=train_sae.Stop())
    assert signal.getsignal(number) == handler
    assert ended.value.code == code
    assert checkpoints(tmp_path) == ["step-00000009"]


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    def end(number):
        assert signal.getsignal(number) == signal.SIG_DFL
        raise Killed

    monkeypatch.setattr(signal, "raise_signal", end)
    with pytest.raises(Killed), train_sae.Stop():
        os.kill(os.getpid(), signal.SIGTERM)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.5)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_the_last_checkpoint_is_not_lost(package, tmp_path, monkeypatch):
    save = train_sae.Trainer.save

    def interrupted(trainer, done):
        os.kill(os.getpid(), signal.SIGTERM)
        save(trainer, done)

    def end(number, frame):
        raise Killed

    monkeypatch.setattr(train_sae.Trainer, "save", interrupted)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Killed):
            run(package, tmp_path, "--steps 5", stop=train_sae.Stop())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoints(tmp_path) == ["step-00000005"]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(package, tmp_path, monkeypatch):
    arguments = "--steps 30 --checkpoint-every 10 --loss topk"
    run(package, tmp_path / "whole", arguments)
    save = train_sae.dcp.save

    def killed_at_20(tensors, checkpoint_id):
        save(tensors, checkpoint_id=checkpoint_id)
        if "20" in checkpoint_id.name:
            (checkpoint_id / ".metadata").unlink()  # the last file to be written
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_sae.dcp, "save", killed_at_20)
        with pytest.raises(Killed):
            run(package, tmp_path / "killed", arguments)
    assert checkpoints(tmp_path / "killed") == ["step-00000010", "step-00000020.part"]
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    run(package, tmp_path / "killed", arguments, "--resume")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(package, tmp_path):
    with pytest.raises(SystemExit):
        run(package, tmp_path, "--steps 30", stop=StopAt(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # options and metrics fit, parameters do not
    try:
        with pytest.raises(train_sae.TrainingError) as raised:
            run(package, tmp_path, "--steps 30 --resume --checkpoint-every 20")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).startswith("no checkpoint of step 20 could be written, earlier ones are kept: ")
    assert "File too large" in str(raised.value)
    assert checkpoints(tmp_path) == ["step-00000010"]


def test_a_damaged_checkpoint_is_named(package, tmp_path):
    run(package, tmp_path, "--steps 3")
    (folder,) = (tmp_path / "checkpoints").iterdir()
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000003 cannot be read: "):
        run(package, tmp_path, "--steps 3 --resume")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(package, tmp_path, monkeypatch, bad):
    batch = train_sae.Synthetic.batch

    def broken(data, step):
        x = batch(data, step)
        x[5, 3] = bad if step == 12 else x[5, 3]
        return x

    monkeypatch.setattr(train_sae.Synthetic, "batch", broken)
    with pytest.raises(train_sae.TrainingError, match=r"^the loss is not finite since step 13: lower --lr$"):
        run(package, tmp_path, "--steps 30 --checkpoint-every 7")
    assert checkpoints(tmp_path) == ["step-00000007"]
    assert all(tensor.isfinite().all() for tensor in state(tmp_path).values())


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_parameters_that_are_not_finite_spoil_no_checkpoint(package, tmp_path, monkeypatch, name):
    step = train_sae.Trainer.step

    def spoiled(trainer, x):
        statistics = step(trainer, x)
        with torch.no_grad():
            getattr(trainer.sae, name).weight[3, 5] += float("nan") if trainer.sae.step == 14 else 0.0
        return statistics

    monkeypatch.setattr(train_sae.Trainer, "step", spoiled)
    with pytest.raises(train_sae.TrainingError, match=r"^the parameters are not finite after step 14: lower --lr$"):
        run(package, tmp_path, "--steps 30 --checkpoint-every 7 --no-graph")
    assert checkpoints(tmp_path) == ["step-00000007"]


def test_a_loss_that_diverges_ends_the_run(package, tmp_path):
    with pytest.raises(train_sae.TrainingError, match=r"^the loss is not finite since step \d+: lower --lr$"):
        run(package, tmp_path, "--steps 30 --lr 1e30 --warmup 0")
    assert metrics(tmp_path) == []  # it ended with the first line it would have written


# Refusals


def main(capsys, monkeypatch, package, *arguments: str) -> tuple[int, str]:
    """The exit code and the last line of standard error."""
    monkeypatch.setattr(sys, "argv", ["train_sae.py", *" ".join(arguments).split()])
    monkeypatch.setattr(train_sae, "load_package", lambda: package)
    monkeypatch.setattr(train_sae, "Stop", lambda: UNSTOPPED)
    try:
        code = train_sae.main()
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-K 97 -F 96", "K must be at most F, got K=97 F=96"),
        ("-B 0", "B must be at least 2, got 0"),
        ("-K 0", "-K must be at least 1, got 0"),
        ("--dead-after 0", "--dead-after must be at least 1, got 0"),
        ("--steps -1", "--steps must be at least 1, got -1"),
        ("--seed -1", "--seed must not be negative, got -1"),
        ("--levels 4,2", "--levels must be positive and ascend"),
        ("--levels 2,x", "argument --levels: invalid budgets value: '2,x'"),
        ("--levels 2,4 -K 8", "-K must be the last of --levels, 4, or left out"),
        ("--levels 2,4 --loss topk", "--levels cannot be combined with --loss topk or --compare"),
        ("--lr 0", "--lr must be positive"),
        ("--fsdp", "--fsdp needs torchrun"),
        ("--compare --loss topk", "--compare trains with either loss: leave --loss out"),
        ("--text corpus.txt --layer 3", "--model, --text and --layer need each other"),
        ("--model gpt2", "--model, --text and --layer need each other"),
        ("--save-activations there", "--save-activations needs --model"),
        ("--activations missing.npy", "missing.npy"),
    ],
)
def test_bad_options_end_with_a_sentence(package, tmp_path, capsys, monkeypatch, arguments, reason):
    code, error = main(capsys, monkeypatch, package, f"--out {tmp_path / 'run'}", arguments)
    assert code == 2
    assert reason in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "holds a run: continue it with --resume, or choose another --out"),
        ("--resume -K 5", "-K is 5, but 4 in the run that"),
        ("--resume --seed 1", "--seed is 1, but 3 in the run that"),
        ("--resume --dead-after 64", "--dead-after is 64, but 32 in the run that"),
        ("--resume --levels 2,4", "--levels is [2, 4], but None in the run that"),
    ],
)
def test_a_run_is_not_mixed_with_another(package, tmp_path, capsys, monkeypatch, arguments, reason):
    common = f"--out {tmp_path} --steps 3 {SIZES}"
    assert main(capsys, monkeypatch, package, common)[0] == 0
    before = state(tmp_path)
    code, error = main(capsys, monkeypatch, package, common, arguments)
    assert (code, reason in error) == (2, True), error
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(tmp_path).items())


def test_a_run_that_failed_before_its_first_checkpoint_may_start_anew(package, tmp_path, capsys, monkeypatch):
    common = f"--out {tmp_path} --steps 3 {SIZES}"
    assert main(capsys, monkeypatch, package, common, f"--activations {tmp_path / 'typo'}")[0] == 2
    assert main(capsys, monkeypatch, package, common)[0] == 0


def test_samples_that_are_all_the_same_are_refused(package, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "same.npy", np.full((2048, 16), 3, dtype=np.float32))
    common = f"--out {tmp_path / 'run'} --steps 3 {SIZES} --activations {tmp_path / 'same.npy'}"
    code, error = main(capsys, monkeypatch, package, common)
    assert (code, "are all the same" in error) == (2, True), error


def test_samples_too_large_for_float32_are_refused(package, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "large.npy", np.random.default_rng(0).standard_normal((2048, 16), dtype=np.float32) * 1e30)
    common = f"--out {tmp_path / 'run'} --steps 3 {SIZES} --activations {tmp_path / 'large.npy'}"
    code, error = main(capsys, monkeypatch, package, common)
    assert (code, "too large for float32" in error) == (2, True), error


def test_samples_along_one_direction_are_not_all_the_same(package, tmp_path):
    lengths = np.random.default_rng(0).uniform(1, 2, (2048, 1)).astype(np.float32)
    np.save(tmp_path / "line.npy", lengths * np.ones((1, 16), dtype=np.float32))
    run(package, tmp_path / "run", f"--steps 3 --activations {tmp_path / 'line.npy'}")
    assert len(metrics(tmp_path / "run")) == 1


def test_a_failed_run_ends_with_exit_code_1(package, tmp_path, capsys, monkeypatch):
    code, error = main(capsys, monkeypatch, package, f"--out {tmp_path} --steps 30 {SIZES} --lr 1e30")
    assert code == 1
    assert error.startswith("error: the loss is not finite since step ")


# Several processes


# All ways in one process, since starting one takes seconds
ALL_WAYS = """
import os, sys, train_sae
for sys.argv, os.environ["MASTER_PORT"] in zip({}, {}):
    assert train_sae.main() == 0
"""


@pytest.mark.skipif(not INTERPRETED, reason="of the CPU: a GPU's TF32 rounds too coarsely to compare")
def test_two_processes_train_as_one_does(package, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "REFRESH_EVERY", 100)
    monkeypatch.setattr(train_sae, "LOG_EVERY", 50)
    arguments = "--steps 150 --auxk-coefficient 0.2"
    ways = {"ddp": [], "fsdp": ["--fsdp"], "begun by one": ["--fsdp", "--resume"]}
    argv = [["train_sae.py", "--out", str(tmp_path / way), *SIZES.split(), *arguments.split(), *options]
            for way, options in ways.items()]  # fmt: skip
    with pytest.raises(SystemExit):
        run(package, tmp_path / "begun by one", arguments, stop=StopAt(70))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in ways]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [str(free.getsockname()[1]) for free in sockets]
    command, env = ("-c", ALL_WAYS.format(argv, ports)), {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}
    processes = [start_process(*command, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(2)]
    try:
        results = run(package, tmp_path / "one", arguments)
        for process in processes:
            error = process.communicate(timeout=60)[1]
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
    one = metrics(tmp_path / "one")
    assert one[-1]["dead"] > 0
    for way in ways:
        several = metrics(tmp_path / way)
        assert [line["dead"] for line in several] == [line["dead"] for line in one]
        for name in ("loss", "explained_variance"):
            # 150 steps with float32's rounding errors, each of some 1e-7
            assert [line[name] for line in several] == pytest.approx([line[name] for line in one], rel=1e-4)
        # A single process can read the checkpoint.
        explained = run(package, tmp_path / way, arguments, "--resume")["explained_variance"]
        assert explained == pytest.approx(results["explained_variance"], rel=1e-4)


# Data


def test_a_run_on_shards_resumes_bit_for_bit(package, tmp_path):
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).standard_normal((1000, 16), dtype=np.float32))
    arguments = f"--steps 80 --activations {tmp_path} -F 64 -K 3 --loss topk"
    run(package, tmp_path / "whole", arguments)
    with pytest.raises(SystemExit):
        run(package, tmp_path / "parts", arguments, stop=StopAt(33))
    results = run(package, tmp_path / "parts", arguments, "--resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert "recovered" not in results


def test_activations_of_a_model_are_saved_without_a_run(tmp_path, capsys, monkeypatch):
    calls = []

    class Activations:
        def __init__(self, *arguments, context, **options):
            calls.append((*arguments, context))

        def save(self, folder):
            calls.append(folder)

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(train_sae, "ModelActivations", Activations)
    arguments = f"--out {tmp_path / 'run'} --model m --text a b --layer 2 --context 64 --save-activations there"
    monkeypatch.setattr(sys, "argv", ["train_sae.py", *arguments.split()])
    monkeypatch.setattr(train_sae, "load_package", lambda: None)
    monkeypatch.setattr(train_sae, "Stop", lambda: UNSTOPPED)
    assert train_sae.main() == 0
    assert calls == [("m", [Path("a"), Path("b")], 2, 64), Path("there"), "closed"]
    assert not (tmp_path / "run").exists()


# What a run leaves


def test_an_export_is_the_sae_on_unscaled_activations(package, tmp_path):
    run(package, tmp_path / "run", f"--steps 20 --export {tmp_path / 'export'}")
    options = parse(tmp_path / "run")
    device = train_sae.start(options)
    torch.set_float32_matmul_precision("highest")
    sae = model.SAE(options, 16, package, device)
    sae.load_state_dict({key.removeprefix(".model."): value for key, value in state(tmp_path / "run").items()
                         if key.startswith(".model.")})  # fmt: skip
    tensors = {
        name: tensor.to(device) for name, tensor in load_file(tmp_path / "export/sae_weights.safetensors").items()
    }
    x = 5 * torch.randn(64, 16, device=device)
    with torch.no_grad():
        vals, indices = package.triton_topk_encode(x * sae.scale - sae.bias, sae.encoder.weight, sae.encoder.bias, 4)
        wanted = package.triton_sae_decode(indices, sae.decoder.weight, vals, sae.bias) / sae.scale
    top = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).topk(4, dim=1)
    codes = torch.zeros(64, 96, device=device).scatter(1, top.indices, top.values.relu())
    assert torch.equal(top.indices, indices)
    torch.testing.assert_close(codes @ tensors["W_dec"] + tensors["b_dec"], wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "export/cfg.json").read_text())
    assert (config["architecture"], config["k"], config["d_in"], config["d_sae"]) == ("topk", 4, 16, 96)


def test_a_comparison_trains_each_sae_once(package, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "COMPARED_BUDGETS", (8, 16))
    options = parse(tmp_path, "--compare --steps 5 -K 12")
    device = train_sae.start(options)
    train_sae.compare(options, package, device, UNSTOPPED)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"hierarchical", "topk-8", "topk-12"}
    table = (tmp_path / "results.md").read_text()
    assert len(table.splitlines()) == 5
    names = ("hierarchical", "topk-8", "topk-12")
    runs = {name: json.loads((tmp_path / name / "results.json").read_text())["explained_variance"] for name in names}
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "HierarchicalTopK": {k: runs["hierarchical"][k] for k in ("8", "12")},
        "TopK, an SAE for each k": {k: runs[f"topk-{k}"][k] for k in ("8", "12")},
        "TopK, the SAE of the largest k": {k: runs["topk-12"][k] for k in ("8", "12")},
    }
    with monkeypatch.context() as patch:
        patch.setattr(train_sae, "run", None)
        train_sae.compare(options, package, device, UNSTOPPED)
    assert (tmp_path / "results.md").read_text() == table
    options.export, options.resume = tmp_path / "export", True
    train_sae.compare(options, package, device, UNSTOPPED)
    assert {path.parent.name for path in options.export.glob("*/sae_weights.safetensors")} == set(names)
    assert (tmp_path / "results.md").read_text() == table
    options.lr = 1.0
    with pytest.raises(ValueError, match=r"^--lr is 1.0, but 0.003 in the run that"):
        train_sae.compare(options, package, device, UNSTOPPED)

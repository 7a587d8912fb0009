# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "kernels>=0.17,<0.18", "torch>=2.11", "numpy>=2", "safetensors", "transformers", "tqdm", "matplotlib>=3.9",
# ]
# ///
"""Train a sparse autoencoder (SAE) for all sparsity budgets, for one, or for a few, on the activations of a model.

    uv run examples/train_sae.py --out run                               a synthetic dictionary that is to be found
    uv run examples/train_sae.py --out run --model gpt2 --text corpus.txt --layer 6
    uv run examples/train_sae.py --out run --activations shards/ --levels 16,32,64
    uv run examples/train_sae.py --out runs --compare                    one SAE for all budgets, and one for each
    torchrun --nproc-per-node 8 examples/train_sae.py --out run --fsdp

OUT gets metrics.jsonl, checkpoints/, results.json and explained_variance.png. Exit codes: 0 trained, 1 the run failed,
2 bad options or data, 130 and 143 interrupted: after a checkpoint, from which --resume continues.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from activations import ModelActivations, Shards, Synthetic
from kernels import get_kernel
from matplotlib.figure import Figure
from sae import AUXK_SHARE, SAE, export, local, normalize_rows, remove_parallel
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "t-tech/flex-sae"
CUDA = torch.cuda.is_available()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DISTRIBUTED = "RANK" in os.environ  # by torchrun

LOG_EVERY, REFRESH_EVERY, ASK_EVERY = 50, 100, 10  # steps between two looks at metrics, dead features, signals
WARM_UP_STEPS = 3  # before a CUDA graph is captured
HELD_OUT_BATCHES = 4
COMPARED_BUDGETS = (8, 16, 32, 64, 128) if CUDA else (4, 8)
RECOVERED = 0.9  # cosine of a true feature and a decoder row
# Options that may differ when a run is resumed
MAY_CHANGE = ["out", "resume", "checkpoint_every", "no_graph", "fsdp", "compare", "export", "save_activations"]

DEFAULTS = {"D": 512, "features": 8192, "active": 24, "F": 8192, "K": 64, "B": 4096, "steps": 4000, "lr": 8e-4}
CPU_DEFAULTS = {"D": 64, "features": 256, "active": 6, "F": 256, "K": 16, "B": 512, "steps": 800, "lr": 3e-3}


class TrainingError(Exception):
    """A run that cannot go on, in a sentence for the user."""


def average(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over ranks."""
    if DISTRIBUTED:
        dist.all_reduce(tensor)  # gloo has no mean
        tensor /= WORLD
    return tensor


def merge_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The maximum over ranks, in place."""
    if DISTRIBUTED:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


class Trainer:
    """The training step: `trainer(x)` gives the statistics of `SAE.forward`, on a GPU by replaying a CUDA graph.

    There is a graph for each size of AuxK's list. The steps before it is captured, which a capture needs for compiling
    and loading kernels, are training steps like the others, so that a resumed run has no more and no fewer."""

    def __init__(self, sae: SAE, options: argparse.Namespace):
        self.sae, self.options, self.model = sae, options, sae
        if options.fsdp:
            for module in (sae.encoder, sae.decoder, sae):
                fully_shard(module)
        elif DISTRIBUTED:
            self.model = DistributedDataParallel(sae, broadcast_buffers=False)
        self.lr = torch.tensor(0.0, device=sae.scale.device)  # where graphs read it
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, fused=True, capturable=CUDA)
        # One pass over [F, D] each, without temporaries
        functions = remove_parallel, normalize_rows
        self.remove_parallel, self.normalize_rows = map(torch.compile, functions) if CUDA else functions
        self.graphs, self.steps, self.x = {}, Counter(), None
        self.pool = torch.cuda.graph_pool_handle() if CUDA else None

    def __call__(self, x: torch.Tensor, lr: float) -> torch.Tensor:
        self.lr.fill_(lr)
        # Given a tensor, DTensor tries Adam out on zeros in the shape of the whole parameters, which takes minutes.
        self.optimizer.param_groups[0]["lr"] = lr if self.options.fsdp else self.lr
        size = self.sae.capacity
        self.steps[size] += 1
        if not CUDA or DISTRIBUTED or self.options.no_graph or self.steps[size] <= WARM_UP_STEPS:
            return self.step(x)
        if self.x is None:
            self.x = torch.empty_like(x)
        if size not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            # The thread that reads activations may allocate meanwhile.
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), "thread_local"):
                self.graphs[size] = graph, self.step(self.x)
        self.x.copy_(x)
        graph, statistics = self.graphs[size]
        graph.replay()
        return statistics

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, self.options.precision == "bf16", cache_enabled=False):
            loss, statistics = self.model(x)
        loss.backward()
        weight = self.sae.decoder.weight
        with torch.no_grad():
            self.remove_parallel(local(weight.grad), local(weight))
            self.optimizer.step()
            self.normalize_rows(local(weight))
        return statistics

    def check(self) -> None:
        """Raise TrainingError if the loss of a step was not finite. Waits for the GPU."""
        if step := int(merge_ranks(self.sae.broken)):
            raise TrainingError(f"the loss is not finite since step {step}: lower --lr")

    def save(self, done: int) -> None:
        """Write a checkpoint, which gets its name once it is complete, and remove the older ones."""
        self.check()
        sums = torch.stack([local(parameter).sum() for parameter in self.sae.parameters()])
        if merge_ranks((~sums.isfinite()).any().int()):
            raise TrainingError(f"the parameters are not finite after step {done}: lower --lr")
        merge_ranks(self.sae.last_fired)
        folder = self.options.out / "checkpoints"
        part, final = folder / f"step-{done:08}.part", folder / f"step-{done:08}"
        try:
            dcp.save(self.state(), checkpoint_id=part)
            if RANK == 0:
                sync_folder(part)
                part.rename(final)
                sync_folder(folder)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            shutil.rmtree(part, ignore_errors=True)
            kept = "no checkpoint of step {} could be written, earlier ones are kept: {}"
            raise TrainingError(kept.format(done, last_line(error))) from None
        if RANK == 0:
            for other in {*folder.glob("step-*")} - {final}:
                shutil.rmtree(other, ignore_errors=True)

    def load(self, checkpoint: Path) -> None:
        state = self.state()
        try:
            dcp.load(state, checkpoint_id=checkpoint)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise ValueError(f"{checkpoint} cannot be read: {last_line(error)}") from None
        model, optimizer = state["model"], state["optimizer"]
        state_dict.set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def state(self) -> dict:
        """What a checkpoint holds, the same with and without FSDP."""
        model, optimizer = state_dict.get_state_dict(self.model, self.optimizer)
        optimizer["param_groups"][0]["lr"] = self.lr
        return {"model": model, "optimizer": optimizer}


def last_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]


def sync_folder(folder: Path) -> None:
    """Make new names in it survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, text: str) -> None:
    """Replace the file as a whole."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def plain(options: argparse.Namespace) -> dict:
    """The options as options.json has them."""
    return json.loads(json.dumps(vars(options), default=str))


def open_run(options: argparse.Namespace) -> None:
    """Make OUT hold this run: a new one, or one of the same options that --resume continues."""
    if newest_checkpoint(options)[1]:
        if not options.resume:
            raise ValueError(f"{options.out} holds a run: continue it with --resume, or choose another --out")
        refuse_other_options(options)
    if RANK == 0:  # bad options have ended every rank by now
        for folder in filter(None, (options.out / "checkpoints", options.export)):
            folder.mkdir(parents=True, exist_ok=True)
        for part in (options.out / "checkpoints").glob("*.part"):
            shutil.rmtree(part)
        write(options.out / "options.json", json.dumps(plain(options), indent=2))
    if DISTRIBUTED:
        dist.barrier()


def refuse_other_options(options: argparse.Namespace) -> None:
    """Raise ValueError unless these options can go on with what OUT holds."""
    stored = options.out / "options.json"
    try:
        before = json.loads(stored.read_text())
    except ValueError:
        raise ValueError(f"{stored} is damaged") from None
    for name, value in plain(options).items():
        if name not in MAY_CHANGE and value != before.get(name):
            raise ValueError(f"{dashed(name)} is {value}, but {before.get(name)} in the run that {options.out} holds")


def dashed(name: str) -> str:
    """An option as users type it."""
    return f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}"


def newest_checkpoint(options: argparse.Namespace) -> tuple[int, Path | None]:
    """Its step and folder; 0 and None if there is none."""
    names = sorted((options.out / "checkpoints").glob("step-????????"))
    return (int(names[-1].name.removeprefix("step-")), names[-1]) if names else (0, None)


def truncate_metrics(path: Path, done: int) -> None:
    """Drop what a run has written after its last checkpoint, an unfinished line too."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    write(path, "".join(kept))


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, and linear decay over the last fifth."""
    warmup = options.warmup * options.steps if options.warmup < 1 else options.warmup
    return options.lr * min(1, (step + 1) / max(warmup, 1), (options.steps - step) / max(options.steps / 5, 1))


class Stop:
    """Within a `with`, SIGINT and SIGTERM wait until they are asked for: `signal` is the number once all ranks know of
    it. A second one, at least a second later, ends the process at once."""

    def __enter__(self):
        self.signal = self._received = 0
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, error, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self._received:  # since it was asked for
            signal.raise_signal(self._received)

    def _receive(self, number, frame):
        if not self._received:
            self._received, self._at = number, time.monotonic()
        elif time.monotonic() > self._at + 1:  # launchers may pass on what the whole process group got
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def ask(self, done: int) -> int:
        if not DISTRIBUTED:
            self.signal = self._received
        elif done % ASK_EVERY == 0:
            self.signal = int(merge_ranks(torch.tensor(self._received)))  # on the CPU: the GPU goes on
        return self.signal


def train(trainer: Trainer, data, options: argparse.Namespace, done: int, stop: Stop) -> None:
    """The steps from `done` on, with metrics and checkpoints."""
    sae, metrics = trainer.sae, options.out / "metrics.jsonl"
    dead_after = options.dead_after / options.B
    if RANK == 0:
        truncate_metrics(metrics, done)
    n_dead, logged, logged_at = sae.fit_capacity(), done, time.perf_counter()
    tokens = {"total": options.steps * options.B, "initial": done * options.B, "unit": "tokens", "unit_scale": True}
    with tqdm(**tokens, disable=RANK > 0) as bar:
        for step in range(done, options.steps):
            statistics = trainer(data.batch(step), learning_rate(step, options))
            done = step + 1
            bar.update(options.B)
            if done % REFRESH_EVERY == 0:
                merge_ranks(sae.last_fired)
                n_dead = sae.refresh_dead(dead_after)
            if done % LOG_EVERY == 0 or done == options.steps:
                statistics = average(statistics.clone())
                trainer.check()
                loss, error, square = statistics[:3].tolist()
                variance = square - statistics[3:].square().mean().item()
                now = time.perf_counter()
                line = {
                    "step": done,
                    "loss": loss,
                    "explained_variance": 1 - error / variance,
                    "dead": n_dead,
                    "tokens_per_second": round((done - logged) * options.B / (now - logged_at)),
                }
                logged, logged_at = done, now
                bar.set_postfix(loss=f"{loss:.4f}", EV=f"{line['explained_variance']:.3f}", dead=n_dead, refresh=False)
                if RANK == 0:
                    with metrics.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            if stop.ask(done) or done % options.checkpoint_every == 0 or done == options.steps:
                trainer.save(done)
            if stop.signal:
                if RANK == 0:
                    bar.write(f"interrupted: --resume continues after step {done}", file=sys.stderr)
                raise SystemExit(128 + stop.signal)


@torch.no_grad()
def evaluate(sae: SAE, data, options: argparse.Namespace, flex) -> dict:
    """Explained variance of held-out activations at budgets 1, 2, 4, .. K, and what else results.json holds."""
    budgets = sorted({*(2**i for i in range(options.K.bit_length())), *(options.levels or ()), options.K})
    ends = torch.tensor(budgets, device=sae.scale.device)
    held_out = data.held_out(HELD_OUT_BATCHES * options.B).float() * sae.scale
    losses = torch.zeros(len(budgets), device=ends.device)
    for x in held_out.split(options.B):
        vals, indices = flex.triton_topk_encode(x - sae.bias, sae.encoder.weight, sae.encoder.bias, sae.K)
        batch = flex.triton_nested_sae_loss(indices, sae.decoder.weight, vals, sae.bias, x, ends)
        losses += batch * (len(x) / len(held_out))
    explained = (1 - losses / held_out.var(dim=0, correction=0).mean()).tolist()
    results = {"explained_variance": dict(zip(map(str, budgets), explained, strict=True))}
    results["dead"] = int((sae.dead >= 0).sum())
    if isinstance(data, Synthetic):
        chunks = data.dictionary.float().split(1024)
        nearest = torch.cat([(chunk @ sae.decoder.weight.t()).amax(1) for chunk in chunks])
        results["recovered"] = float((nearest > RECOVERED).float().mean())
    return results


def plot(path: Path, curves: dict[str, dict[str, float]]) -> None:
    """Explained variance over k of each curve {k: explained variance}."""
    ink = "#767d86"  # legible on light and on dark
    style = {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for (name, curve), marker in zip(curves.items(), "os^Dvx", strict=False):
            axes.plot([int(k) for k in curve], list(curve.values()), marker=marker, label=name)
        ticks = sorted({int(k) for curve in curves.values() for k in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel="active features k", ylabel="explained variance, held-out")
        axes.grid(alpha=0.25, color=ink)
        axes.legend(framealpha=0)
        figure.savefig(path, transparent=True, dpi=150)


def load_package():
    """The build that LOCAL_KERNELS names; in a checkout else a fresh one of it, elsewhere the published one."""
    named, scripts = os.environ.get("LOCAL_KERNELS", ""), ROOT / "scripts"
    if f"{REPO_ID}=" not in named and (scripts / "build_local.py").exists():
        sys.path.insert(0, str(scripts))
        from build_local import BuildError, build

        if RANK == 0:
            try:
                build(ROOT / "build")
            except BuildError as error:
                raise ValueError(error) from None
        if DISTRIBUTED:
            dist.barrier()
        os.environ["LOCAL_KERNELS"] = f"{named}:{REPO_ID}={ROOT}".lstrip(":")
    return get_kernel(REPO_ID, version=1, trust_remote_code=[REPO_ID])


def open_data(options: argparse.Namespace, flex, device: torch.device):
    common = {"batch_size": options.B, "seed": options.seed, "device": device, "rank": RANK, "world": WORLD}
    if not options.model and not options.activations:
        return Synthetic(options.D, options.features, decode=flex.triton_sae_decode, active=options.active, **common)
    common["held_out_rows"] = HELD_OUT_BATCHES * options.B
    if options.activations:
        return Shards(options.activations, **common)
    return ModelActivations(options.model, options.text, options.layer, context=options.context, **common)


def save_activations(options: argparse.Namespace, flex, device: torch.device, _) -> None:
    with closing(open_data(options, flex, device)) as data:
        data.save(options.save_activations)


def run(options: argparse.Namespace, flex, device: torch.device, stop: Stop) -> dict:
    """Train one SAE; its results, on rank 0."""
    open_run(options)
    with closing(open_data(options, flex, device)) as data:
        done, checkpoint = newest_checkpoint(options)
        sae = SAE(options, data.D, flex, device)
        x = data.batch(0).float()
        norm, mean = average(x.norm(dim=1).mean()), average(x.mean(0))
        if norm.isinf() or merge_ranks((x - mean).abs().max()) <= 1e-5 * mean.abs().max():  # float32 rounds a mean
            raise ValueError("the samples of the first batch are all the same, or too large for float32")
        sae.fit_to(norm, mean)
        trainer = Trainer(sae, options)
        if checkpoint:
            trainer.load(checkpoint)
        with stop:
            train(trainer, data, options, done, stop)
        if options.fsdp:
            gathered = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = state_dict.get_model_state_dict(sae, options=gathered)
            del trainer, sae  # make room
        if RANK > 0:
            return {}
        if options.fsdp:
            sae = SAE(options, data.D, flex, device)
            sae.load_state_dict(whole)
        results = evaluate(sae, data, options, flex)
        if options.export:
            export(sae, options.export)
    plot(options.out / "explained_variance.png", {describe(options): results["explained_variance"]})
    write(options.out / "results.json", json.dumps(results, indent=2))
    print(json.dumps(results))
    return results


def describe(options: argparse.Namespace) -> str:
    if options.levels:
        return f"nested, k = {', '.join(map(str, options.levels))}"
    return {"hierarchical": "HierarchicalTopK", "topk": f"TopK, k = {options.K}"}[options.loss]


def compare(options: argparse.Namespace, flex, device: torch.device, stop: Stop) -> None:
    """One HierarchicalTopK SAE beside TopK SAEs of several budgets, and the largest of them cut to smaller budgets."""
    budgets = sorted({*(k for k in COMPARED_BUDGETS if k <= options.K), options.K})
    runs = {"hierarchical": {"loss": "hierarchical"}, **{f"topk-{k}": {"loss": "topk", "K": k} for k in budgets}}
    explained = {}
    for name, changes in runs.items():
        places = {"out": options.out / name, "export": options.export and options.export / name}
        one = argparse.Namespace(**{**vars(options), **changes, **places})
        finished, exported = one.out / "results.json", not one.export or (one.export / "cfg.json").exists()
        if finished.exists() and exported:
            refuse_other_options(one)
            results = json.loads(finished.read_text())
        else:
            results = run(one, flex, device, stop)
        if DISTRIBUTED:
            dist.barrier()
        explained[name] = results.get("explained_variance")
    if RANK > 0:
        return
    curves = {
        "HierarchicalTopK": explained["hierarchical"],
        "TopK, an SAE for each k": {str(k): explained[f"topk-{k}"][str(k)] for k in budgets},
        "TopK, the SAE of the largest k": explained[f"topk-{options.K}"],
    }
    curves = {name: {str(k): curve[str(k)] for k in budgets} for name, curve in curves.items()}
    rows = [["explained variance", *(f"k = {k}" for k in budgets)], ["---"] * (len(budgets) + 1)]
    rows += [[name, *(f"{value:.3f}" for value in curve.values())] for name, curve in curves.items()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    plot(options.out / "explained_variance.png", curves)
    write(options.out / "results.json", json.dumps(curves, indent=2))
    write(options.out / "results.md", table)
    print(table, end="")


def budgets(text: str) -> list[int]:
    return [int(k) for k in text.split(",")]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default = DEFAULTS if CUDA else CPU_DEFAULTS
    shown = "(default: %(default)s)"
    add("--out", type=Path, required=True, help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("-F", type=int, default=default["F"], help=f"dictionary features {shown}")
    add("-K", type=int, help=f"active features per sample (default: {default['K']}, or the last of --levels)")
    add("-B", type=int, default=default["B"], help=f"samples per step, of all processes {shown}")
    add("--steps", type=int, default=default["steps"], help=shown)
    add("--lr", type=float, default=default["lr"], help=f"Adam's learning rate {shown}")
    add("--warmup", type=float, default=0.05, help=f"steps of linear warm-up, below 1 a share of all {shown}")
    add("--loss", choices=("hierarchical", "topk"), default="hierarchical", help=shown)
    add("--levels", type=budgets, help="budgets to train, such as 8,16,32")
    add("--auxk-coefficient", type=float, default=1 / 32, help=f"of the loss for dead features, 0 for none {shown}")
    add("--dead-after", type=int, help="samples without firing (default: 10 million, at most a tenth of the run)")
    add("--precision", choices=("tf32", "bf16"), default="tf32", help=f"of matrix products, on a GPU {shown}")
    add("--deterministic", action="store_true", help="the same bits in every run, with any loss")
    add("--seed", type=int, default=0, help=shown)
    add("--checkpoint-every", type=int, default=1000, help=f"steps {shown}")
    add("--no-graph", action="store_true", help="do not use CUDA graphs")
    add("--fsdp", action="store_true", help="shard the parameters over torchrun's processes")
    add("--compare", action="store_true", help="also train a TopK SAE for each budget")
    add("--export", type=Path, metavar="DIR", help="write the SAE for sae-lens there")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("-D", type=int, default=default["D"], help=f"width of synthetic activations {shown}")
    add("--features", type=int, default=default["features"], help=f"true features of synthetic ones {shown}")
    add("--active", type=int, default=default["active"], help=f"of them in a synthetic sample, about {shown}")
    add("--activations", type=Path, help=".npy or .safetensors [rows, D], or a folder of such shards")
    add("--model", help="a Hugging Face model, whose activations on --text are used")
    add("--text", type=Path, nargs="+", metavar="FILE", help="of plain text, or .jsonl with the field text")
    add("--layer", type=int, help="whose output is used, from 0")
    add("--context", type=int, default=128, help=f"tokens {shown}")
    add("--save-activations", type=Path, metavar="DIR", help="write the activations of --model as shards and exit")
    return complete(parser.parse_args(arguments), parser, default)


def complete(options: argparse.Namespace, parser: argparse.ArgumentParser, default: dict) -> argparse.Namespace:
    """Fill in what depends on other options, and end with exit code 2 if they do not fit together."""
    if options.levels:
        if options.levels != sorted({*options.levels}) or options.levels[0] < 1:
            parser.error("--levels must be positive and ascend")
        if options.K not in (None, options.levels[-1]):
            parser.error(f"-K must be the last of --levels, {options.levels[-1]}, or left out")
        if options.loss == "topk" or options.compare:
            parser.error("--levels cannot be combined with --loss topk or --compare")
    if options.compare and options.loss == "topk":
        parser.error("--compare trains with either loss: leave --loss out")
    if options.K is None:
        options.K = options.levels[-1] if options.levels else default["K"]
    if options.dead_after is None:
        options.dead_after = min(10_000_000, max(1, options.steps * options.B // 10))
    for name in ("F", "K", "D", "steps", "features", "active", "dead_after", "checkpoint_every", "context"):
        if getattr(options, name) < 1:
            parser.error(f"{dashed(name)} must be at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}")
    if not options.lr > 0 or not options.warmup >= 0 or not options.auxk_coefficient >= 0:
        parser.error("--lr must be positive, --warmup and --auxk-coefficient must not be negative")
    if options.K > options.F:
        parser.error(f"K must be at most F, got K={options.K} F={options.F}")
    if options.B < 2:
        parser.error(f"B must be at least 2, got {options.B}")
    if DISTRIBUTED and options.B % (AUXK_SHARE * WORLD):  # so that AuxK takes the same samples
        parser.error(f"B must be divisible by {AUXK_SHARE} times the {WORLD} processes, got {options.B}")
    if options.fsdp and not DISTRIBUTED:
        parser.error("--fsdp needs torchrun")
    if not (options.model is None) == (options.text is None) == (options.layer is None):
        parser.error("--model, --text and --layer need each other")
    if options.model and options.activations:
        parser.error("choose one of --model and --activations")
    if options.save_activations and (DISTRIBUTED or not options.model):
        parser.error("--save-activations needs --model, and a single process")
    return options


def start(options: argparse.Namespace) -> torch.device:
    """Set up this process; its device."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints of a single process
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # older torch has no other name for it
    torch.set_float32_matmul_precision("high")
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cpu")
    if CUDA:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # a capture needs another one than the default
    if DISTRIBUTED:
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    return device


def main() -> int:
    options = parse_options()
    try:
        device, stop = start(options), Stop()
        work = save_activations if options.save_activations else compare if options.compare else run
        work(options, load_package(), device, stop)
        return 0
    except (TrainingError, OSError) as raised:
        code, error = 1, raised
    except ValueError as raised:
        code, error = 2, raised
    except (RuntimeError, MemoryError) as raised:
        if not isinstance(raised, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(raised):
            raise
        code, error = 1, "out of memory: choose a smaller -B or -F"
    except KeyboardInterrupt:
        code, error = 130, "interrupted"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Training steps of an SAE: their inputs, the ways to compute them, and the steps that are timed."""

import functools
import re
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import inputs
import measure
import torch
from cases import Case, Shape
from inputs import SETS
from peers import ROOT
from torch.nn.functional import linear, normalize
from training_check import check


class Arguments(NamedTuple):
    """What a training step starts from."""

    x: torch.Tensor  # [B, D]
    encoder: torch.Tensor  # [F, D]
    encoder_bias: torch.Tensor  # [F]
    decoder: torch.Tensor  # [F, D]
    bias: torch.Tensor  # [D]


class TrainingInputs:
    """SETS activations that share the parameters. With rows of unit norm all features are about equally likely."""

    def __init__(self, shape: Shape):
        torch.manual_seed(0)
        randn = functools.partial(torch.randn, device=inputs.DEVICE)
        encoder, decoder = (normalize(randn(shape.F, shape.D), dim=1).requires_grad_() for _ in range(2))
        encoder_bias, bias = (randn(size).mul_(0.1).requires_grad_() for size in (shape.F, shape.D))
        self.leaves = [encoder, encoder_bias, decoder, bias]
        self.sets = [Arguments(randn(shape.B, shape.D), *self.leaves) for _ in range(SETS)]
        self.vals_grad = randn(shape.B, shape.K)  # of the encoder alone

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def autocast(case: Case):
    return torch.autocast(inputs.DEVICE, dtype=torch.bfloat16, enabled=case.precision == "autocast")


def dense_encode(x, weight, bias, k):
    """What users write in plain torch."""
    return torch.topk(linear(x, weight, bias).relu(), k, dim=1)


def training_function(encode, loss, k: int):
    """A function of Arguments that gives loss, vals and indices; without a loss, None, vals and indices."""

    def forward(x, encoder, encoder_bias, decoder, bias):
        vals, indices = encode(x - bias, encoder, encoder_bias, k)
        if loss is None:
            return None, vals, indices
        return loss(indices, decoder, vals, bias, x), vals.detach(), indices

    return forward


def implementations(case: Case, made: TrainingInputs, package: ModuleType, optimizer) -> dict:
    """The functions of a case by the name of their row; of mode "parts" the steps."""
    if case.mode == "parts":
        return parts(case, made, package, optimizer)
    if case.mode == "auxk":
        return auxk(case, made, package)
    fused = getattr(package, f"triton_{case.loss}_sae_loss") if case.loss else None
    reference = getattr(package, f"{case.loss}_sae_loss") if case.loss else None
    k = case.shape.K
    functions = {
        "flex_sae": training_function(package.triton_topk_encode, fused, k),
        "torch encoder, flex_sae loss": training_function(dense_encode, fused, k),
        "torch eager": training_function(dense_encode, reference, k),
        "torch.compile": torch.compile(training_function(dense_encode, reference, k), dynamic=False),
    }
    return {row: functions[row] for row in case.rows}


def make_step(case: Case, made: TrainingInputs, function, optimizer=None):
    """step(i) on input set i gives loss, vals, indices."""
    dtype = torch.bfloat16 if case.precision == "autocast" else torch.float32
    vals_grad = made.vals_grad.to(dtype)

    def step(i):
        made.clear()
        with autocast(case):
            loss, vals, indices = function(*made.sets[i])
        if loss is None:
            vals.backward(vals_grad)
        else:
            loss.backward()
        if optimizer:
            optimizer.step()
        # Detached: a result that is kept must not keep what its backward pass has saved.
        return None if loss is None else loss.detach(), vals.detach(), indices

    return step


def make_optimizer(case: Case, made: TrainingInputs) -> torch.optim.Optimizer | None:
    """lr=0: the same work, and the parameters stay what was checked."""
    if case.mode in ("encoder", "auxk"):
        return None
    options = {"fused": True, "capturable": case.mode == "training graph"} if case.optimizer == "fused" else {}
    return torch.optim.Adam(made.leaves, lr=0.0, **options)


def prepare(case: Case, made: TrainingInputs, optimizer, row: str, function):
    """Check a row. Returns the step to time, and what its record gets; raises whatever the row raises."""
    if case.mode in ("parts", "auxk"):  # of a row that is checked as a whole, and code that has a test of its own
        return function, {"status": "ok"}
    step = make_step(case, made, function, optimizer)
    if case.mode == "training graph":
        step = capture(made, step)
    record = {"status": "ok", "error": check(case, made, step, row)}
    if case.mode == "training graph":
        return step, record
    record.update(measure.memory(made, step, optimizer))
    if case.mode == "encoder":
        del record["total_gib"]  # it counts a decoder
    return step, record


def capture(made: TrainingInputs, step):
    """measure.capture, whose replays also put back the gradients of their set, for the check."""

    def with_gradients(i):
        return step(i), [leaf.grad for leaf in made.leaves]

    replay = measure.capture(with_gradients)

    def replayed(i):
        results, gradients = replay(i)
        for leaf, gradient in zip(made.leaves, gradients, strict=True):
            leaf.grad = gradient
        return results

    return replayed


def parts(case: Case, made: TrainingInputs, package: ModuleType, optimizer) -> dict:
    """The steps of mode "parts" by the name of the part: each is timed apart, on what the parts before it gave."""
    k, loss = case.shape.K, getattr(package, f"triton_{case.loss}_sae_loss")
    _, encoder, encoder_bias, decoder, bias = made.sets[0]
    centred = [arguments.x - bias for arguments in made.sets]

    def encode(x):
        with autocast(case):
            return package.triton_topk_encode(x, encoder, encoder_bias, k)

    encoded = [encode(x) for x in centred]
    vals, kernels = encoded[0][0], package.encode_kernels
    rows = kernels.block_rows(case.shape.B, case.shape.F, k, vals.dtype)

    @torch.no_grad()
    def matmul(i):
        weight = encoder.to(vals.dtype)
        for block in centred[i].split(rows):
            kernels.linear(block, weight, encoder_bias, vals.dtype)

    leaves = [chosen.detach().requires_grad_() for chosen, _ in encoded]
    make_step(case, made, training_function(package.triton_topk_encode, loss, k))(0)
    gradients = [leaf.grad for leaf in made.leaves]
    vals_grad = made.vals_grad.to(vals.dtype)

    def loss_and_gradients(i):
        with autocast(case):
            value = loss(encoded[i][1], decoder, leaves[i], bias, made.sets[i].x)
        torch.autograd.grad(value, [decoder, leaves[i], bias])

    def encoder_gradients(i):
        torch.autograd.grad(encoded[i][0], [encoder, encoder_bias, bias], vals_grad, retain_graph=True)

    def adam(i):
        for leaf, gradient in zip(made.leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()

    return {
        "matmul": matmul,
        "encode": torch.no_grad()(lambda i: encode(centred[i])),
        "loss": loss_and_gradients,
        "encoder gradients": encoder_gradients,
        "Adam": adam,
    }


def auxk(case: Case, made: TrainingInputs, package: ModuleType) -> dict:
    """The steps of mode "auxk", with the code of docs/trainers.md."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "trainers.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(next(block for block in blocks if "def auxk_backward" in block), names)
    B, K, F, D = case.shape.B, case.shape.K, case.shape.F, case.shape.D
    make_step(case, made, training_function(package.triton_topk_encode, package.triton_topk_sae_loss, K))(0)
    _, weight, encoder_bias, decoder, bias = made.sets[0]
    gradients = [leaf.grad for leaf in made.leaves]
    encoder = SimpleNamespace(weight=weight, bias=encoder_bias)
    targets = [arguments.x[: B // 4] for arguments in made.sets]
    centred = [target - bias.detach() for target in targets]
    indices = torch.randint(F, (B, K), device=inputs.DEVICE)
    vals = torch.randn(B, K, device=inputs.DEVICE)
    last_fired = torch.zeros(F, dtype=torch.long, device=inputs.DEVICE)
    dead = torch.randperm(F, device=inputs.DEVICE)[: F // 20].sort().values

    def update_last_fired(i):
        last_fired.scatter_reduce_(0, indices.flatten(), (vals > 0).flatten() * i, "amax")

    def step(i):
        for leaf, gradient in zip(made.leaves, gradients, strict=True):
            leaf.grad = gradient
        with autocast(case):
            names["auxk_backward"](centred[i], targets[i], encoder, decoder, dead, D // 2, scale=1 / 32)

    return {"last_fired": update_last_fired, "AuxK": step}

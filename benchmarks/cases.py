"""What is measured: a suite is a list of cases, a case is one loss or training step at one shape in one mode."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    B: int  # samples
    K: int  # active features a sample
    F: int  # dictionary features
    D: int  # model width
    dtype: str = "float32"
    distribution: str = "uniform"  # of the indices, or "zipf"


@dataclass(frozen=True)
class Case:
    """One loss at one shape, computed by the package, by the baselines and by the peers named here. The modes:

    step           the loss and its gradients for weight, vals and bias
    adam           step, then torch.optim.Adam over weight and bias
    deterministic  step under torch.use_deterministic_algorithms(True)
    one thread     step under torch.autograd.set_multithreading_enabled(False)
    graph          the replay of a CUDA graph of step

    With a precision, "float32", "TF32" or "autocast" (to bfloat16), it is a training step of an SAE:

    training        encoder, selection, loss, gradients and Adam
    training graph  the replay of a CUDA graph of training
    encoder         encoder and selection with their gradients; it has no loss
    parts           the parts of the package's training step, each a row
    auxk            AuxK of docs/trainers.md with a twentieth of the features dead

    And two that have no such loss:

    decode          reconstructions and their gradients for weight, vals and bias
    nested          the sum of nested losses, and its gradients for weight, vals and bias
    """

    shape: Shape
    loss: str
    mode: str = "step"
    peers: tuple[str, ...] = ()
    precision: str = ""
    optimizer: str = "fused"  # or "default": torch.optim.Adam with no options

    @property
    def rows(self) -> tuple[str, ...]:
        return {"parts": PARTS, "auxk": AUXK, "nested": tuple(NESTED)}.get(self.mode, ("flex_sae", *self.peers))


PEERS = {
    "topk": ("torch eager", "torch.compile", "embedding_bag", "dense"),
    "hierarchical": ("torch eager", "torch.compile"),
}
LOSSES = tuple(PEERS)
TRAINING_PEERS = ("torch encoder, flex_sae loss", "torch eager", "torch.compile")
# "encode" is matmul and selection.
PARTS = ("matmul", "encode", "loss", "encoder gradients", "Adam")
# The bookkeeping of what has fired, which every step pays, and AuxK itself
AUXK = ("last_fired", "AuxK")
# The number of levels, and whether each sample has ends of its own
NESTED = {
    "flex_sae, L=1": (1, False),
    "flex_sae, L=5": (5, False),
    "flex_sae, L=5, of each sample": (5, True),
    "flex_sae, L=10": (10, False),
    "5 masked decodes": (5, False),
}
DECODE_PEERS = (
    *("flex_sae, random rows", "flex_sae, Zipf rows", "embedding_bag", "torch.sparse"),
    *("dense codes", "flex_sae, of dense codes"),
)


def decoder_step() -> list[Case]:
    """Time and peak memory of a decoder step with Adam, against torch.compile of the references."""
    return [
        Case(Shape(8192, K, 65536, 2304, dtype), loss, "adam", ("torch.compile",))
        for dtype in ("float32", "bfloat16")
        for K in (32, 64, 128)
        for loss in LOSSES
    ]


def losses() -> list[Case]:
    """Loss and gradients at sizes that people train at, against every other way to compute them at the middle one."""
    cases = []
    for K in (32, 128):
        shape = Shape(4096, K, 65536, 2304)
        cases += [Case(shape, loss, "step", PEERS[loss]) for loss in LOSSES]
        cases += [Case(shape, loss, "deterministic") for loss in LOSSES]
        for other in (replace(shape, distribution="zipf"), replace(shape, dtype="bfloat16")):
            cases += [Case(other, loss) for loss in LOSSES]
    for shape in (Shape(4096, 32, 24576, 768), Shape(4096, 64, 131072, 4096)):
        cases += [Case(shape, loss, mode) for mode in ("step", "deterministic") for loss in LOSSES]
    return cases


def sizes() -> list[Case]:
    """One axis at a time around a base point; sizes that are a multiple of nothing among them."""
    base = Shape(4096, 64, 65536, 2304)
    axes = {
        "B": (256, 1000, 16384),
        "K": (8, 50, 256),
        "F": (16384, 262144),
        "D": (384, 1000, 1023, 8192),
    }
    shapes = [base] + [replace(base, **{axis: size}) for axis, values in axes.items() for size in values]
    return [Case(shape, loss) for shape in shapes for loss in LOSSES]


def small() -> list[Case]:
    """A step that the device finishes before the host has launched it."""
    shape = Shape(256, 32, 16384, 768)
    return [Case(shape, loss, mode, PEERS[loss]) for mode in ("step", "one thread", "graph") for loss in LOSSES]


def training() -> list[Case]:
    """A training step and its parts; at the middle shape also with torch's defaults for matmuls and Adam."""
    cases, middle = [], Shape(4096, 64, 65536, 2304)
    for shape in (Shape(4096, 32, 24576, 768), middle, Shape(8192, 64, 131072, 4096)):
        for precision in ("TF32", "autocast"):
            for loss in LOSSES:
                cases.append(Case(shape, loss, "training", TRAINING_PEERS, precision))
                cases += [Case(shape, loss, mode, (), precision) for mode in ("training graph", "parts")]
            cases.append(Case(shape, "", "encoder", TRAINING_PEERS[1:], precision))
            cases.append(Case(shape, "", "auxk", (), precision))
        if shape == middle:
            cases += [Case(shape, "hierarchical", "training", (), p, "default") for p in ("float32", "TF32")]
    return cases


def decode() -> list[Case]:
    """The decode of fixed and ragged rows with its gradients, beside the TopK loss and other ways to compute it."""
    cases = []
    for shape in (Shape(4096, 32, 24576, 768), Shape(4096, 64, 65536, 2304)):
        for dtype in ("float32", "bfloat16"):
            float32_only = () if dtype == "float32" else ("embedding_bag", "torch.sparse")
            peers = tuple(peer for peer in DECODE_PEERS if peer not in float32_only)
            cases += [Case(replace(shape, dtype=dtype), "", "decode", peers), Case(replace(shape, dtype=dtype), "topk")]
    return cases


def nested() -> list[Case]:
    """Nested losses with their gradients, beside the other two losses."""
    shapes = (Shape(4096, 32, 24576, 768), Shape(4096, 64, 65536, 2304), Shape(4096, 128, 65536, 2304))
    return [case for s in shapes for case in (Case(s, "", "nested"), Case(s, "topk"), Case(s, "hierarchical"))]


SUITES = {suite.__name__: suite for suite in (decoder_step, losses, sizes, small, training, decode, nested)}


def quick(case: Case) -> Case:
    """The same case at a size that only shows that it runs."""
    shape = case.shape
    return replace(case, shape=replace(shape, B=max(64, shape.B // 16), F=shape.F // 16, D=max(64, shape.D // 4)))

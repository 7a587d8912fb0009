"""examples/trainers/with_dictionary_learning.py: the trainers' steps, unmodified and on these kernels, are the same."""

import importlib
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.trainers
pytest.importorskip("dictionary_learning")

B, D, F, K, STEPS = 8, 16, 64, 4, 20

# A loss is a mean of B sums of D squares, each of some ten operations: in float32 two right runs differ by about 1e-6,
# and Adam, which divides gradients by their size, keeps relative errors as they are.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def example(flex):
    try:
        return importlib.import_module("with_dictionary_learning")
    except ImportError as missing:
        if "dictionary_learning" not in str(missing):
            raise
        pytest.skip(f"dictionary-learning {version('dictionary-learning')}: {missing}")


def train(trainer_class, device, **options):
    """The loss and the active features of each step, and the parameters before and after."""
    trainer = trainer_class(
        steps=STEPS,
        activation_dim=D,
        dict_size=F,
        k=K,
        layer=0,
        lm_name="none",
        lr=1e-2,
        warmup_steps=1,
        threshold_start_step=2,
        seed=0,
        device=device,
        **options,
    )
    trainer.dead_feature_threshold = 3 * B  # tokens, so that AuxK has something to do
    before = [parameter.detach().clone() for parameter in trainer.ae.parameters()]
    losses, active, auxiliary = [], [], []
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(B, D, generator=generator).to(device)
        with torch.no_grad():
            active.append(trainer.ae.encode(x, use_threshold=False) != 0)
        losses.append(trainer.update(step, x))
        auxiliary.append(trainer.dead_features > 0)
    return torch.tensor(losses), torch.stack(active), any(auxiliary), before, list(trainer.ae.parameters())


@pytest.mark.parametrize(
    ("trainer", "autoencoder"), [("TopKTrainer", "FlexTopK"), ("BatchTopKTrainer", "FlexBatchTopK")]
)
def test_the_trainer_takes_the_same_steps(example, device, trainer, autoencoder):
    from dictionary_learning.trainers import batch_top_k, top_k

    trainer_class = getattr(top_k if trainer == "TopKTrainer" else batch_top_k, trainer)
    expected, expected_active, auxiliary, before, expected_weights = train(trainer_class, device)
    with patch.object(example.flex, "triton_sae_decode", wraps=example.flex.triton_sae_decode) as decode:
        losses, active, _, _, weights = train(trainer_class, device, dict_class=getattr(example, autoencoder))
    assert decode.call_count == STEPS
    assert auxiliary
    # Where two activations nearly tie, rounding may choose another feature, and from that step on curves part although
    # both are right. Before it they may not.
    flips = (active != expected_active).flatten(1).any(1).nonzero()
    steps = int(flips[0]) if len(flips) else STEPS
    assert steps >= STEPS // 2
    torch.testing.assert_close(losses[:steps], expected[:steps], rtol=TOLERANCE, atol=0)
    if steps == STEPS:
        for weight, right, start in zip(weights, expected_weights, before, strict=True):
            assert (weight - right).norm() <= TOLERANCE * right.norm()
            assert (right - start).norm() > 100 * TOLERANCE * right.norm()


def test_the_decoder_keeps_its_layout(example, device):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=2,
        activation_dim=D,
        dict_size=F,
        k=K,
        layer=0,
        lm_name="none",
        warmup_steps=1,
        device=device,
        dict_class=example.FlexTopK,
    )
    for step in range(2):
        trainer.update(step, torch.randn(B, D, device=device))
    weight = trainer.ae.decoder.weight
    assert weight.t().is_contiguous() and trainer.optimizer.state[weight]["exp_avg"].t().is_contiguous()

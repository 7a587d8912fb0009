"""examples/trainers/with_sae_lens.py: SAETrainer's steps, unmodified and on these kernels, are the same."""

import importlib
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.trainers
sae_lens = pytest.importorskip("sae_lens")

B, D, F, K, STEPS = 8, 16, 64, 4, 20

# A loss is a mean of B sums of D squares, each of some ten operations: in float32 two right runs differ by about 1e-6,
# and Adam, which divides gradients by their size, keeps relative errors as they are.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def example(flex):
    try:
        return importlib.import_module("with_sae_lens")
    except ImportError as missing:
        if "sae_lens" not in str(missing):
            raise
        pytest.skip(f"sae-lens {version('sae-lens')}: {missing}")


def train(sae_class, config_class, device, **options):
    """The losses and the active features of each step, and the parameters before and after."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D, d_sae=F, k=K, device=device, **options))
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    config = SAETrainerConfig(
        total_training_samples=B * STEPS,
        train_batch_size_samples=B,
        lr=1e-2,
        lr_end=1e-2,
        device=device,
        dead_feature_window=3,  # steps, so that AuxK has something to do
        logger=LoggingConfig(log_to_wandb=False),
    )
    generator = torch.Generator().manual_seed(1)
    batches = (torch.randn(B, D, generator=generator) for _ in range(STEPS))
    trainer = SAETrainer(config, sae, batches)
    outputs, step = [], trainer.step
    trainer.step = lambda batch: outputs.append(step(batch)) or outputs[-1]
    trainer.fit()
    assert len(outputs) == STEPS
    losses = {name: torch.stack([output.losses[name].detach() for output in outputs]) for name in outputs[0].losses}
    active = torch.stack([output.feature_acts != 0 for output in outputs])
    return losses, active, before, [parameter.detach() for parameter in sae.parameters()]


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not_rescaled"])
@pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
def test_the_trainer_takes_the_same_steps(example, device, kind, rescale):
    sae_class, config_class = (getattr(sae_lens, f"{kind}TrainingSAE{suffix}") for suffix in ("", "Config"))
    options = {"rescale_acts_by_decoder_norm": rescale}
    expected, expected_active, before, expected_weights = train(sae_class, config_class, device, **options)
    with patch.object(example.flex, "triton_sae_decode", wraps=example.flex.triton_sae_decode) as decode:
        losses, active, _, weights = train(getattr(example, f"Flex{kind}"), config_class, device, **options)
    assert decode.call_count == STEPS
    assert expected["auxiliary_reconstruction_loss"].any()
    # Where two activations nearly tie, rounding may choose another feature, and from that step on curves part although
    # both are right. Before it they may not.
    flips = (active != expected_active).flatten(1).any(1).nonzero()
    steps = int(flips[0]) if len(flips) else STEPS
    assert steps >= STEPS // 2
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name][:steps], expected[name][:steps], rtol=TOLERANCE, atol=0)
    if steps == STEPS:
        for weight, right, start in zip(weights, expected_weights, before, strict=True):
            assert (weight - right).norm() <= TOLERANCE * right.norm()
            assert (right - start).norm() > 100 * TOLERANCE * right.norm()

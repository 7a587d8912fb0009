"""examples/trainers/with_sae_lens_matryoshka.py: every loss and gradient of a training is sae-lens' own."""

import importlib
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.trainers
sae_lens = pytest.importorskip("sae_lens")

B, D, F, K, STEPS = 8, 12, 48, 3, 100
WIDTHS = [12, 24, F]

# A loss is a mean of B sums of D squares, each of some ten operations: in float32 two right values differ by about
# 1e-6, and so do two gradients, relative to their norms.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def example(flex):
    try:
        return importlib.import_module("with_sae_lens_matryoshka")
    except ImportError as missing:
        if "sae_lens" not in str(missing):
            raise
        pytest.skip(f"sae-lens {version('sae-lens')}: {missing}")


def config(device, **options):
    return sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, matryoshka_widths=WIDTHS, device=device, **options
    )


@pytest.mark.parametrize(
    ("rescale", "auxiliary"), [(True, False), (False, True)], ids=["rescaled", "not_rescaled_auxk_of_each_level"]
)
def test_the_losses_and_their_gradients_are_the_trainers(example, device, rescale, auxiliary):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    options = {"rescale_acts_by_decoder_norm": rescale, "use_matryoshka_aux_loss": auxiliary}
    sae = sae_lens.MatryoshkaBatchTopKTrainingSAE(config(device, **options))
    # The trainer trains sae-lens' own class. The example's, of the same parameters, sees each of its batches, so that
    # no rounding adds up and no near tie of two activations parts the two.
    flex_sae = example.FlexMatryoshkaBatchTopK(config(device, **options))
    for name, parameter in sae.named_parameters():
        setattr(flex_sae, name, parameter)
    trainer_forward, totals, auxiliary_losses = sae.training_forward_pass, [], []

    def training_forward_pass(step_input):
        expected, output = trainer_forward(step_input), flex_sae.training_forward_pass(step_input)
        assert output.losses.keys() == expected.losses.keys() >= {"mse_loss", "inner_mse_loss_12", "inner_mse_loss_24"}
        for name, loss in expected.losses.items():
            torch.testing.assert_close(output.losses[name], loss, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(output.loss, expected.loss, rtol=TOLERANCE, atol=0)
        active = expected.feature_acts != 0
        assert torch.equal(output.feature_acts, expected.feature_acts)
        grads, expected_grads = (
            torch.autograd.grad(out.loss, [out.feature_acts, *sae.parameters()], retain_graph=True)
            for out in (output, expected)
        )
        # Of the codes only nonzeros have a gradient in pairs; the others' goes nowhere.
        pairs = [(grads[0][active], expected_grads[0][active]), *zip(grads[1:], expected_grads[1:], strict=True)]
        for grad, right in pairs:
            assert (grad - right).norm() <= TOLERANCE * right.norm()
        totals.append(expected.loss.item())
        auxiliary_losses.append(expected.losses["auxiliary_reconstruction_loss"].item())
        return expected

    sae.training_forward_pass = training_forward_pass
    trainer_config = SAETrainerConfig(
        total_training_samples=B * STEPS,
        train_batch_size_samples=B,
        lr=1e-2,
        lr_end=1e-2,
        device=device,
        dead_feature_window=3,  # steps, so that AuxK has something to do
        logger=LoggingConfig(log_to_wandb=False),
    )
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4 * B, D, generator=generator)
    batches = (data[torch.randint(len(data), (B,), generator=generator)] for _ in range(STEPS))
    nested = example.flex.triton_nested_sae_loss
    with patch.object(example.flex, "triton_nested_sae_loss", wraps=nested) as nested:
        SAETrainer(trainer_config, sae, batches).fit()
    assert nested.call_count == len(totals) == STEPS
    assert any(auxiliary_losses)
    assert sum(totals[-10:]) < 0.7 * sum(totals[:10])  # it has trained


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_a_reconstruction_that_is_rescaled_is_refused(example, device, normalize):
    sae = example.FlexMatryoshkaBatchTopK(config(device, normalize_activations=normalize))
    with pytest.raises(ValueError, match="normalize_activations"):
        sae.training_forward_pass(None)

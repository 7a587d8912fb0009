"""examples/trainers/with_overcomplete.py: overcomplete's train_sae, unmodified and on these kernels, takes the same
steps."""

import importlib
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.trainers

B, D, F, K, STEPS = 8, 16, 64, 4, 10

# A loss is a mean of B * D squares, each of some ten operations: in float32 two right runs differ by about 1e-6, and
# Adam, which divides gradients by their size, keeps relative errors as they are. Without the gradient of
# codes or dictionary the last loss changes by over 1e-4.
TOLERANCE = 1e-5


@pytest.fixture
def sae():
    try:
        return pytest.importorskip("overcomplete.sae")
    except AttributeError as error:  # overcomplete 0.3 and matplotlib 3.11
        pytest.skip(f"overcomplete {version('overcomplete')} cannot be imported: {error}")


@pytest.fixture
def example(flex, sae):
    for name in ("TopKSAE", "BatchTopKSAE"):
        if not hasattr(getattr(sae, name, None), "decode"):
            pytest.skip(f"overcomplete {version('overcomplete')} has no {name}.decode")
    return importlib.import_module("with_overcomplete")


def train(sae, module, name, criterion, device, use_multiplier):
    """The losses and the nonzero codes of each step, and the SAE with its parameters before."""
    torch.manual_seed(0)
    batches = [batch.to(device) for batch in torch.randn(STEPS, B, D)]
    top_k = K if name == "TopKSAE" else B * K
    model = getattr(module, name)(
        D, F, top_k=top_k, dictionary_params={"use_multiplier": use_multiplier}, device=device
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    selected = []
    model.register_forward_hook(lambda module, inputs, output: selected.append(output[1].detach() != 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    logs = sae.train_sae(model, batches, getattr(sae.losses, criterion), optimizer, nb_epochs=1, device=device)
    return torch.tensor(logs["step_loss"]), torch.stack(selected), before, model


@pytest.mark.parametrize(
    ("name", "criterion", "use_multiplier"),
    [("TopKSAE", "mse_l1", True), ("TopKSAE", "top_k_auxiliary_loss", False), ("BatchTopKSAE", "mse_elastic", False)],
)
def test_the_trainer_takes_the_same_steps(sae, example, device, name, criterion, use_multiplier):
    options = name, criterion, device, use_multiplier
    expected, expected_selected, before, right = train(sae, sae, *options)
    with patch.object(example.flex, "triton_sae_decode", wraps=example.flex.triton_sae_decode) as decode:
        losses, selected, _, model = train(sae, example, *options)
    assert decode.call_count == STEPS
    # Where two codes nearly tie, rounding may select another one, and curves part although both are right. Among these
    # few that is not to be expected; it would be no error of the kernels.
    assert torch.equal(selected, expected_selected)
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
    weights = dict(model.named_parameters())
    for name, weight in right.named_parameters():
        assert (weights[name] - weight).norm() <= TOLERANCE * weight.norm(), name
        assert (weight - before[name]).norm() > 100 * TOLERANCE * weight.norm(), name


def test_eval_mode_reconstructs_as_overcomplete_does(sae, example, device):
    _, _, _, model = train(sae, example, "BatchTopKSAE", "mse_l1", device, False)
    model.eval()
    x = torch.randn(B, D, device=device)
    with patch.object(example.flex, "triton_sae_decode", side_effect=AssertionError):
        _, codes, recon = model(x)
    torch.testing.assert_close(recon, codes @ model.get_dictionary())

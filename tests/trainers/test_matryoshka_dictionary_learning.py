"""dictionary-learning's Matryoshka loss is a weighted sum of triton_nested_sae_loss's, in every step of a training."""

from importlib.metadata import version

import pytest
import torch
from pairs import nested_pairs

pytestmark = pytest.mark.trainers
pytest.importorskip("dictionary_learning")

B, D, F, K, STEPS = 8, 12, 48, 3, 100
FRACTIONS = [0.25, 0.25, 0.5]
WIDTHS = [12, 24, 48]

# A loss is a mean of B sums of D squares, each of some ten operations: in float32 two right values differ by about
# 1e-6, and so do two gradients, relative to their norms.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trainer_class():
    try:
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    except ImportError as missing:
        if "dictionary_learning" not in str(missing):
            raise
        pytest.skip(f"dictionary-learning {version('dictionary-learning')}: {missing}")
    return MatryoshkaBatchTopKTrainer


@pytest.mark.parametrize("group_weights", [None, [0.5, 0.1, 0.4]], ids=["equal", "weighted"])
def test_the_loss_and_its_gradients_are_the_trainers(flex, trainer_class, device, group_weights):
    trainer = trainer_class(
        steps=STEPS,
        activation_dim=D,
        dict_size=F,
        k=K,
        layer=0,
        lm_name="none",
        group_fractions=FRACTIONS,
        group_weights=group_weights,
        lr=1e-2,
        warmup_steps=1,
        seed=0,
        device=device,
    )
    ae, trainer_loss, trainer_encode, encoded = trainer.ae, trainer.loss, trainer.ae.encode, []
    # The trainer takes the mean, not the sum, of the weighted losses, and its default weights are 1 / L: 1 / L ** 2.
    # Its errors are sums over D.
    level_weights = torch.tensor(group_weights or [1 / len(WIDTHS)] * len(WIDTHS), device=device) * (D / len(WIDTHS))
    widths = torch.tensor(WIDTHS, device=device)
    compared = []

    def encode(x, **options):
        encoded.append(trainer_encode(x, **options))
        return encoded[-1]

    def loss(x, step):
        expected = trainer_loss(x, step=step)
        codes = encoded[-1][0]
        indices, vals, ends = nested_pairs(codes, B * K, widths)  # one sample may have all codes of the batch
        losses = flex.triton_nested_sae_loss(indices, ae.W_dec, vals, ae.b_dec, x, ends)
        nested = losses @ level_weights
        torch.testing.assert_close(nested, expected, rtol=TOLERANCE, atol=0)
        # The encoder's are behind those of codes; only nonzeros get one from nested_pairs.
        inputs = [codes, *ae.parameters()]
        expected_grads = torch.autograd.grad(expected, inputs, retain_graph=True)
        grads = torch.autograd.grad(nested, inputs, retain_graph=True)
        active = codes != 0
        for grad, right in [
            (grads[0][active], expected_grads[0][active]),
            *zip(grads[1:], expected_grads[1:], strict=True),
        ]:
            assert (grad - right).norm() <= TOLERANCE * right.norm()
        compared.append(nested.item())
        return expected

    ae.encode, trainer.loss = encode, loss
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4 * B, D, generator=generator).to(device)
    for step in range(STEPS):
        trainer.update(step, data[torch.randint(len(data), (B,), generator=generator).to(device)])
    assert len(compared) == STEPS
    assert sum(compared[-10:]) < 0.7 * sum(compared[:10])  # it has trained

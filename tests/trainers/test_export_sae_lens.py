"""examples/train_sae.py --export: sae-lens loads the SAE, and encodes and decodes as it does."""

import pytest
import torch

pytestmark = pytest.mark.trainers
sae_lens = pytest.importorskip("sae_lens")
pytest.importorskip("tqdm")

import sae as model  # noqa: E402
import train_sae  # noqa: E402


def test_sae_lens_loads_an_export_that_encodes_and_decodes_as_the_sae(flex, device, tmp_path):
    arguments = ["-B", "64", "-K", "4", "-F", "96", "-D", "16", "--features", "24", "--active", "2", "--steps", "50"]
    options = train_sae.parse_options(["--out", str(tmp_path / "run"), *arguments])
    sae = model.SAE(options, 16, flex, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    x = (5 * torch.randn(64, 16, generator=generator) + 2).to(device)
    sae.fit_to(x.norm(dim=1).mean(), x.mean(0))
    with torch.no_grad():  # untied, and with a bias, as after training
        sae.encoder.weight += 0.1 * torch.randn(96, 16, generator=generator).to(device)
        sae.encoder.bias += 0.1 * torch.randn(96, generator=generator).to(device)
    model.export(sae, tmp_path / "export")

    loaded = sae_lens.SAE.load_from_disk(tmp_path / "export", device=device)
    with torch.no_grad():
        vals, indices = flex.triton_topk_encode(x * sae.scale - sae.bias, sae.encoder.weight, sae.encoder.bias, sae.K)
        recon = flex.triton_sae_decode(indices, sae.decoder.weight, vals, sae.bias) / sae.scale
        codes = torch.zeros(64, 96, device=device).scatter(1, indices.long(), vals / sae.scale)
        torch.testing.assert_close(loaded.encode(x), codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.decode(loaded.encode(x)), recon, rtol=1e-4, atol=1e-4)

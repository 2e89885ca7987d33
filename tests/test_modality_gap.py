"""Ways over the modality gap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipgen.generation.modality_gap import EmbeddingProjector, mean_shift
from clipgen.models.conditioning import add_condition_noise
from clipgen.pipeline import TextToImage

PROMPT = "a large blue ring on a white background"


def unit(rows: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)


@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.3])
def test_noise_is_as_large_as_asked(cosine):
    e = unit(4000, 64)
    before = e.clone()
    noisy = add_condition_noise(e, cosine)
    torch.testing.assert_close(noisy.norm(dim=-1), torch.ones(4000))
    assert (noisy * e).sum(-1).mean().item() == pytest.approx(cosine, abs=0.01)
    assert (noisy @ noisy.T).fill_diagonal_(0).mean().abs() < 0.01  # isotropic
    assert torch.equal(e, before)


def test_cosine_one_adds_no_noise():
    e = unit(3)
    assert torch.equal(add_condition_noise(e, 1.0), e)


def test_the_mean_shift_brings_the_means_together():
    content = 0.1 * torch.randn(500, 8)  # what image and sentence share; the gap is constant (arXiv:2401.08567)
    images, sentences = (F.normalize(content + gap, dim=-1) for gap in (torch.eye(8)[0], torch.eye(8)[1]))
    moved = EmbeddingProjector(mean_shift(images, sentences))(sentences)
    assert torch.allclose(moved.norm(dim=-1), torch.ones(500))
    assert (sentences * images).sum(1).mean() < 0.2 and (moved * images).sum(1).mean() > 0.99
    assert torch.equal(EmbeddingProjector()(sentences), sentences)


def test_projection_by_hand():
    memory, asked = unit(20), unit(3)
    for row, found in zip(asked, EmbeddingProjector(memory=memory, neighbors=2, temperature=0.1)(asked)):
        first, second = sorted(memory, key=lambda m: -(m @ row).item())[:2]
        a, b = torch.exp(first @ row / 0.1), torch.exp(second @ row / 0.1)
        assert torch.allclose(found, F.normalize((a * first + b * second) / (a + b), dim=0), atol=1e-5)
    assert torch.allclose(EmbeddingProjector(memory=memory, neighbors=1)(memory), memory, atol=1e-6)
    assert torch.allclose(EmbeddingProjector(memory=memory, neighbors=99, temperature=1e-4)(memory), memory, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"neighbors": 0}, {"temperature": 0.0}])
def test_settings_that_make_no_sense(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        EmbeddingProjector(**wrong)


def test_a_pipeline_draws_behind_its_bridge(pipe, tmp_path):
    """A memory of one image: every sentence asks for that one. It is saved with the pipeline, and told by its hash."""
    plain, fingerprint = pipe.embed(PROMPT), pipe.fingerprint
    bridged = TextToImage(
        pipe.vqgan, pipe.transformer, pipe.clip, EmbeddingProjector(torch.ones(64) / 8, unit(1, 64), 3, 0.5)
    )
    assert torch.allclose(bridged.embed(PROMPT), bridged.projector.memory, atol=1e-6)
    assert not torch.allclose(plain, bridged.embed(PROMPT), atol=0.1) and bridged.fingerprint != fingerprint
    loaded = TextToImage.load(bridged.save(tmp_path / "pipe"))
    assert loaded.fingerprint == bridged.fingerprint and (loaded.projector.neighbors, loaded.projector.temperature) == (
        3,
        0.5,
    )
    (tmp_path / "pipe/projector.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"projector\.safetensors is damaged"):
        TextToImage.load(tmp_path / "pipe")

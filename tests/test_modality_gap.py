"""The modality gap: noise augmentation, mean shift and projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipgen.generation.modality_gap import EmbeddingProjector, mean_shift
from clipgen.models.conditioning import add_condition_noise
from clipgen.pipeline import TextToImage

PROMPT = "a large blue ring on a white background"


def unit_vectors(count: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=-1)


@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.3])
def test_noise_has_the_configured_cosine(cosine):
    e = unit_vectors(4000, 64)
    before = e.clone()
    noisy = add_condition_noise(e, cosine)
    torch.testing.assert_close(noisy.norm(dim=-1), torch.ones(4000))
    assert (noisy * e).sum(-1).mean().item() == pytest.approx(cosine, abs=0.01)
    assert (noisy @ noisy.T).fill_diagonal_(0).mean().abs() < 0.01  # isotropic
    assert torch.equal(e, before)


def test_cosine_one_adds_no_noise():
    e = unit_vectors(3)
    assert torch.equal(add_condition_noise(e, 1.0), e)


def test_mean_shift_closes_a_constant_gap():
    content = 0.1 * torch.randn(500, 8)  # shared by image and text
    images = F.normalize(content + torch.eye(8)[0], dim=-1)
    texts = F.normalize(content + torch.eye(8)[1], dim=-1)
    moved = EmbeddingProjector(mean_shift(images, texts))(texts)
    assert torch.allclose(moved.norm(dim=-1), torch.ones(500))
    assert (texts * images).sum(1).mean() < 0.2 and (moved * images).sum(1).mean() > 0.99
    assert torch.equal(EmbeddingProjector()(texts), texts)


def test_projection_by_hand():
    memory = unit_vectors(20)
    texts = unit_vectors(3)
    for text, projected in zip(texts, EmbeddingProjector(memory=memory, neighbors=2, temperature=0.1)(texts)):
        first, second = sorted(memory, key=lambda m: -(m @ text).item())[:2]
        a = torch.exp(first @ text / 0.1)
        b = torch.exp(second @ text / 0.1)
        assert torch.allclose(projected, F.normalize((a * first + b * second) / (a + b), dim=0), atol=1e-5)
    assert torch.allclose(EmbeddingProjector(memory=memory, neighbors=1)(memory), memory, atol=1e-6)
    assert torch.allclose(EmbeddingProjector(memory=memory, neighbors=99, temperature=1e-4)(memory), memory, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"neighbors": 0}, {"temperature": 0.0}])
def test_invalid_settings_raise(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        EmbeddingProjector(**wrong)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"shift": torch.ones(1, 8)}, r"shift must be floating-point embeddings, got \(1, 8\)"),
        ({"memory": torch.ones(8)}, r"memory must be floating-point embeddings, got \(8,\)"),
        ({"memory": torch.full((2, 8), torch.nan)}, "memory must be finite, got NaN or infinity"),
        ({"shift": torch.ones(8), "memory": torch.ones(2, 9)}, r"memory must be \(N, 8\), as wide as shift"),
    ],
)
def test_invalid_embeddings_raise(embeddings, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingProjector(**embeddings)


def test_pipeline_applies_and_saves_its_projector(pipe, tmp_path):
    """A memory of one image: every text is projected onto that one."""
    plain = pipe.embed(PROMPT)
    projector = EmbeddingProjector(torch.ones(64) / 8, unit_vectors(1, 64), neighbors=3, temperature=0.5)
    with_projector = TextToImage(pipe.vqgan, pipe.transformer, pipe.clip, projector)
    assert torch.allclose(with_projector.embed(PROMPT), projector.memory, atol=1e-6)
    assert not torch.allclose(plain, with_projector.embed(PROMPT), atol=0.1)
    assert torch.equal(plain, with_projector.embed(PROMPT, projected=False))
    assert with_projector.fingerprint != pipe.fingerprint
    loaded = TextToImage.load(with_projector.save(tmp_path / "pipe"))
    assert loaded.fingerprint == with_projector.fingerprint
    assert (loaded.projector.neighbors, loaded.projector.temperature) == (3, 0.5)


def test_projector_file_has_the_permissions_of_other_files(tmp_path):
    (tmp_path / "other").touch()
    path = EmbeddingProjector(torch.ones(8)).save(tmp_path / "projector.safetensors")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_projector_saved_in_half_precision_is_half_as_large(tmp_path):
    memory = unit_vectors(20)
    path = EmbeddingProjector(memory=memory).save(tmp_path / "projector.safetensors", half=True)
    loaded = EmbeddingProjector.load(path).memory
    assert loaded.dtype == torch.float32 and path.stat().st_size < 20 * 8 * 2 + 300
    torch.testing.assert_close(loaded, memory, atol=1e-3, rtol=0)


def test_damaged_projector_is_named(pipe, tmp_path):
    pipe.save(tmp_path / "pipe")
    (tmp_path / "pipe/projector.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"projector\.safetensors is damaged"):
        TextToImage.load(tmp_path / "pipe")

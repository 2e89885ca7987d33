"""The projector that stage 2 builds from its training images."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from commands import PROMPT, SHAPES, TRANSFORMER, trained
from conftest import QUIET
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_class_transformer, make_transformer, make_vqgan
from torch.utils.data import DataLoader

from clipgen import TextToImage
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.training.callbacks import ImageLogger, ProjectorBuilder

EMBEDDINGS = F.normalize(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), dim=-1)


def train(*callbacks: pl.Callback, checkpoint: Path | None = None) -> None:
    """Train for three steps on 12 cached samples in batches of 4, or continue such a training after its first step."""
    data = [{"indices": torch.zeros(16, dtype=torch.long), "condition": embedding} for embedding in EMBEDDINGS]
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=list(callbacks), **QUIET)
    loader = DataLoader(data[4:] if checkpoint else data, batch_size=4)
    trainer.fit(make_transformer(**TRANSFORMER_SIZES), loader, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(("size", "remembered"), [(6, 6), (8, 8), (100, 12)])
def test_the_first_training_embeddings_are_remembered(tmp_path, size, remembered):
    """All of them, if the training ends before the memory is full."""
    train(ProjectorBuilder(tmp_path, memory_size=size, neighbors=3, temperature=0.5))
    projector = EmbeddingProjector.load(tmp_path / "projector.safetensors")
    torch.testing.assert_close(projector.memory, EMBEDDINGS[:remembered])
    assert (projector.neighbors, projector.temperature, projector.shift) == (3, 0.5, None)


class SaveAfterFirstStep(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path, weights_only=False)


def test_a_resumed_training_continues_the_memory(tmp_path):
    checkpoint = tmp_path / "first.ckpt"
    (tmp_path / "resumed").mkdir()
    train(ProjectorBuilder(tmp_path, memory_size=8), SaveAfterFirstStep(checkpoint))
    train(ProjectorBuilder(tmp_path / "resumed", memory_size=8), checkpoint=checkpoint)
    undisturbed, resumed = (
        EmbeddingProjector.load(folder / "projector.safetensors") for folder in (tmp_path, tmp_path / "resumed")
    )
    assert torch.equal(resumed.memory, undisturbed.memory)


def test_an_existing_projector_is_kept(tmp_path):
    kept = EmbeddingProjector(memory=EMBEDDINGS[:2]).save(tmp_path / "projector.safetensors").read_bytes()
    train(ProjectorBuilder(tmp_path, memory_size=4))
    assert (tmp_path / "projector.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_vqgan(**VQGAN_SIZES),
        lambda: make_class_transformer(["red", "blue"], **TRANSFORMER_SIZES | {"clip_dim": 2}),
    ],
    ids=["vqgan", "class-conditional"],
)
def test_other_models_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"projector\.memory_size must be 0"):
        ProjectorBuilder(tmp_path).on_fit_start(None, model())


@pytest.mark.parametrize("wrong", [{"memory_size": 0}, {"neighbors": 0}, {"temperature": 0.0}])
def test_invalid_settings_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        ProjectorBuilder(tmp_path, **wrong)


def test_run_uses_its_projector_for_prompts(call, tmp_path_factory, monkeypatch):
    """In the grids of the training, and in the pipeline that is loaded from the run folder."""
    folder, _ = trained(tmp_path_factory.getbasetemp())
    embedded = []
    embed = ImageLogger._embed_prompts
    monkeypatch.setattr(ImageLogger, "_embed_prompts", lambda *args: embedded.append(embed(*args)) or embedded[-1])
    arguments = ["projector.memory_size=8", "projector.neighbors=2", f"image_logger.prompts=[{PROMPT}]"]
    result = call("clipgen-train", *TRANSFORMER, *SHAPES, f"vqgan={folder / 'vqgan_run'}", "output=run", *arguments)
    assert result.code == 0, result.stderr
    pipe = TextToImage.load("run")
    assert pipe.projector is not None and pipe.projector.memory.shape == (8, pipe.clip.embed_dim)
    own = pipe.clip.encode_text([PROMPT])
    assert (own @ embedded[-1].T).item() < 0.99
    torch.testing.assert_close(embedded[-1], pipe.embed(PROMPT))

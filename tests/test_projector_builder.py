"""The projector that stage 2 builds from its training images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from commands import PROMPT, SHAPES, TRANSFORMER, trained
from conftest import QUIET
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_class_transformer, make_transformer, make_vqgan
from torch.utils.data import DataLoader

from clipgen import TextToImage
from clipgen.cli.config import compose_config
from clipgen.cli.early_checks import complete_for_cache
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.training.callbacks import ImageLogger, ProjectorBuilder

EMBEDDINGS = F.normalize(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), dim=-1)


def train(*callbacks: pl.Callback, checkpoint: Path | None = None, stop: int = 0) -> None:
    """Train for three steps on 12 cached samples in batches of 4, or continue such a training after a step."""
    data = [{"indices": torch.zeros(16, dtype=torch.long), "condition": embedding.clone()} for embedding in EMBEDDINGS]
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=list(callbacks), **QUIET)
    loader = DataLoader(data[4 * stop :] or data, batch_size=4)
    trainer.fit(make_transformer(**TRANSFORMER_SIZES), loader, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(("size", "remembered"), [(6, 6), (8, 8), (100, 12)])
def test_the_first_training_embeddings_are_remembered(tmp_path, size, remembered):
    """All of them, if the training ends before the memory is full."""
    train(ProjectorBuilder(tmp_path, memory_size=size, neighbors=3, temperature=0.5))
    projector = EmbeddingProjector.load(tmp_path / "projector.safetensors")
    torch.testing.assert_close(projector.memory, EMBEDDINGS[:remembered])
    assert (projector.neighbors, projector.temperature, projector.shift) == (3, 0.5, None)


class SaveAfter(pl.Callback):
    """Save a checkpoint after a step."""

    def __init__(self, step: int, path: Path):
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


class PoisonFirstCondition(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 0:
            batch["condition"][0] = float("nan")


def test_a_resumed_training_continues_the_memory(tmp_path):
    checkpoint = tmp_path / "first.ckpt"
    (tmp_path / "resumed").mkdir()
    train(ProjectorBuilder(tmp_path, memory_size=8), SaveAfter(1, checkpoint))
    train(ProjectorBuilder(tmp_path / "resumed", memory_size=8), checkpoint=checkpoint, stop=1)
    undisturbed, resumed = (
        EmbeddingProjector.load(folder / "projector.safetensors") for folder in (tmp_path, tmp_path / "resumed")
    )
    assert torch.equal(resumed.memory, undisturbed.memory)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_training_resumed_with_other_settings_writes_a_new_projector(tmp_path, stop):
    """From any checkpoint, to any folder, with the embeddings that it holds."""
    checkpoint = tmp_path / "stop.ckpt"
    train(ProjectorBuilder(tmp_path, memory_size=100), SaveAfter(stop, checkpoint))
    folder = tmp_path / "resumed"
    folder.mkdir()
    train(ProjectorBuilder(folder, memory_size=8, neighbors=7), checkpoint=checkpoint, stop=stop)
    resumed = EmbeddingProjector.load(folder / "projector.safetensors")
    assert torch.equal(resumed.memory, EMBEDDINGS[:8]) and resumed.neighbors == 7


def test_only_the_first_process_writes(tmp_path):
    builder = ProjectorBuilder(tmp_path, memory_size=100)
    builder.load_state_dict({"embeddings": [EMBEDDINGS]})
    for is_first, exists in ((False, False), (True, True)):
        builder.on_fit_end(SimpleNamespace(is_global_zero=is_first), None)
        assert (tmp_path / "projector.safetensors").exists() == exists


def test_non_finite_conditions_are_left_out(tmp_path):
    """The training skips their steps."""
    train(ProjectorBuilder(tmp_path, memory_size=100), PoisonFirstCondition())
    assert torch.equal(EmbeddingProjector.load(tmp_path / "projector.safetensors").memory, EMBEDDINGS[1:])


def test_projector_of_a_run_without_a_checkpoint_is_removed(call, tmp_path_factory):
    folder, _ = trained(tmp_path_factory.getbasetemp())
    Path("run").mkdir()
    EmbeddingProjector(memory=EMBEDDINGS).save("run/projector.safetensors")
    result = call("clipgen-train", *TRANSFORMER, *SHAPES, f"vqgan={folder / 'vqgan_run'}", "output=run")
    assert result.code == 0, result.stderr
    assert TextToImage.load("run").projector is None


def test_class_conditional_transformer_has_no_projector():
    """Also with a recipe that builds one."""
    config = compose_config(
        "stage=transformer", "experiment=cifar10", "data=cached", "data.root=x", "data.conditioning=class"
    )
    assert config.projector.memory_size == 2000
    complete_for_cache(config)
    assert config.projector.memory_size == 0


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

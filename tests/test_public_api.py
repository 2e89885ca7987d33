"""The modules in a notebook or another program: subclasses, one's own loops and loaders, copies, adapters."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, changed, weights_of
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

import clipgen.vqgan
from clipgen import FrozenCLIP, TextToImage
from clipgen.clip import BUNDLED_CLIPS
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.folder import ImageFolder
from clipgen.data.shapes import ShapesDataset
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.feature_store import measure_batch
from clipgen.evaluation.features import Features
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.run import evaluate
from clipgen.models.quantizers import GumbelQuantizer
from clipgen.precompute import encode
from clipgen.sampling import per_sample_seeds, per_sample_uniforms
from clipgen.vqgan import VQGAN


def gan(kind: type[VQGAN] = VQGAN, **arguments) -> VQGAN:
    torch.manual_seed(1)
    return kind(**(VQGAN_SIZES | dict(gan_weight=0.5, gan_start_step=0) | arguments))


def loader(images: torch.Tensor, batch_size: int = 4) -> DataLoader:
    return DataLoader([{"images": image} for image in images], batch_size)


def trained(module: pl.LightningModule, images: torch.Tensor, steps: int = 2) -> pl.Trainer:
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", **QUIET)
    trainer.fit(module, loader(images))
    return trainer


# ----------------------------------------------------------------------------------------------------------- subclasses


class Brighter(VQGAN):
    """Wants dark reconstructions too."""

    def autoencoder_loss(self, images, reconstruction, quantized):
        darkness = {"dark_loss": 100 * reconstruction.mean()}
        return super().autoencoder_loss(images, reconstruction, quantized) | darkness


class WithoutSchedules(VQGAN):
    def configure_optimizers(self):
        return super().configure_optimizers()[0]


@pytest.mark.parametrize("gan_weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_subclass_adds_a_loss(images, gan_weight):
    arguments = dict(gan_weight=gan_weight, dead_code_reset_after=0)  # which draws
    plain, brighter = (gan(kind, **arguments) for kind in (VQGAN, Brighter))
    trained(plain, images)
    trained(brighter, images)
    assert "autoencoder.decoder.conv_out.weight" in changed(brighter, weights_of(plain))


@pytest.mark.slow
def test_a_subclass_brings_its_own_optimizers(images):
    vqgan = gan(WithoutSchedules)
    before = weights_of(vqgan)
    trained(vqgan, images, 1)
    assert changed(vqgan, before)


@pytest.mark.slow
def test_files_of_a_subclass(tmp_path, images):
    vqgan = gan(Brighter)
    trained(vqgan, images).save_checkpoint(tmp_path / "last.ckpt")
    vqgan.eval().save(tmp_path / "vqgan")
    for path in (tmp_path / "vqgan", tmp_path / "last.ckpt"):
        for kind in (VQGAN, Brighter):
            again = kind.load(path)
            assert type(again) is kind and torch.equal(again.encode(images), vqgan.encode(images))


class Adapted(nn.Module):
    """A layer with something added, as LoRA does; ``weight`` is the layer's own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.added = layer, nn.Linear(*layer.weight.shape, bias=False)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 5 * self.added(x)


def test_pictures_are_drawn_with_an_adapter(tiny_transformer):
    transformer = copy.deepcopy(tiny_transformer).eval()
    e = nn.functional.normalize(torch.randn(3, 64), dim=-1)
    before = transformer.sample(e, temperature=0)
    block = transformer.gpt.transformer.h[0]
    block.attn.c_attn, block.mlp.c_fc = Adapted(block.attn.c_attn), Adapted(block.mlp.c_fc)
    drawn = transformer.sample(e, temperature=0)
    assert not torch.equal(drawn, before)
    with torch.no_grad():
        assert torch.equal(transformer(drawn, e).argmax(-1), drawn)


# ---------------------------------------------------------------------------------------------------- own training loop


@pytest.mark.parametrize("stage", [1, 2])
def test_a_moving_average_that_nobody_moved_is_none(tmp_path, images, stage):
    model = gan(ema_decay=0.9) if stage == 1 else make_transformer(**TRANSFORMER_SIZES, ema_decay=0.9)
    with torch.no_grad():
        for p in model.parameters():  # what a loop without Lightning does
            p.add_(0.1) if p.requires_grad else None
    again = type(model).load(model.eval().save(tmp_path / "model"))
    if stage == 1:
        assert torch.equal(again(images), model(images)) and torch.equal(model.active_model(images)[0], model(images))
        assert not changed(again.autoencoder, weights_of(model.autoencoder))
    else:
        assert not changed(again.gpt, weights_of(model.gpt)) and model.eval_model is model.gpt


def test_fine_tuning_keeps_the_codes_where_they_are(tmp_path, tiny_vqgan, images):
    arguments = VQGAN_SIZES | dict(kmeans_iters=5, learning_rate=0.0, dead_code_reset_after=0)
    vqgan = make_vqgan(**arguments)
    vqgan.load_state_dict(tiny_vqgan.state_dict())
    again = VQGAN.load(vqgan.save(tmp_path / "vqgan"))
    trained(again, images, 1)
    assert torch.equal(again.eval().encode(images), tiny_vqgan.encode(images))


def test_a_tokenizer_without_its_discriminator_goes_on_without(tmp_path, images, caplog):
    again = VQGAN.load(gan().save(tmp_path / "vqgan"))
    trained(again, images).save_checkpoint(tmp_path / "last.ckpt")
    assert "loaded without a discriminator, and trains without" in caplog.text
    assert torch.equal(VQGAN.load(tmp_path / "last.ckpt")(images), again.eval()(images))


def test_the_perceptual_loss_is_there_outside_of_training(monkeypatch, images):
    class Distance(nn.Module):
        def forward(self, a, b):
            return (a - b).abs().flatten(1).mean(1)

    monkeypatch.setattr(clipgen.vqgan, "load_lpips", lambda weights: Distance())
    vqgan = gan(perceptual_weight=2.0).eval()
    reconstruction, quantized = vqgan.autoencode(images)
    expected = 2 * (images - reconstruction).abs().mean()
    torch.testing.assert_close(vqgan.autoencoder_loss(images, reconstruction, quantized)["perceptual_loss"], expected)
    (logged,) = pl.Trainer(accelerator="cpu", **QUIET).validate(vqgan, loader(images, 8), verbose=False)
    assert logged["val/perceptual_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_arguments_of_other_kinds_become_plain_ones(tmp_path, images):
    vqgan = gan(learning_rate=np.float32(1e-3), vgg_weights=Path("vgg.pth"), betas=np.array([0.5, 0.9]))
    assert vqgan.hparams["vgg_weights"] == "vgg.pth" and vqgan.hparams["betas"] == [0.5, 0.9]
    trained(vqgan, images).save_checkpoint(tmp_path / "last.ckpt")
    VQGAN.load(tmp_path / "last.ckpt").save(tmp_path / "vqgan")


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow)])
def test_precisions_that_a_gan_does_not_take(images, precision):
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", precision=precision, **QUIET)
    with pytest.raises(ValueError, match=f"trainer.precision must be 32-true or bf16-mixed, got {precision}$"):
        trainer.fit(gan(), loader(images))


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_has_weights_of_its_own(images):
    vqgan = gan(compile=True).eval()
    vqgan.apply_speed_options_()
    other, pickled = copy.deepcopy(vqgan), pickle.loads(pickle.dumps(vqgan))
    expected = VQGAN(**vqgan.hparams | {"compile": False}).eval()
    expected.load_state_dict(vqgan.state_dict())
    with torch.no_grad():
        for p in vqgan.parameters():
            p.zero_()
        for each in (other, pickled):
            torch.testing.assert_close(
                each.autoencoder.decoder.forward_features(z := torch.randn(1, 32, 4, 4)),
                expected.autoencoder.decoder.forward_features(z),
            )


@pytest.mark.slow
def test_a_trained_transformer_can_be_pickled(tiny_vqgan, shapes_clip, images):
    transformer = make_transformer(**TRANSFORMER_SIZES, schedule="cosine").attach_encoders(tiny_vqgan, shapes_clip)
    trained(transformer, images)
    assert not changed(pickle.loads(pickle.dumps(transformer)), weights_of(transformer))


# ----------------------------------------------------------------------------------------------------------------- data


def test_a_plain_loader_augments_anew_every_time(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path, 16, train=True)
    assert len({folder[0]["images"].sum().item() for _ in range(8)}) > 4
    assert torch.equal(folder[3, 0]["images"], folder[3, 0]["images"])


def test_a_cache_in_a_plain_loader(tmp_path, tiny_vqgan, shapes_clip):
    encode(tmp_path, ImageDataModule(ShapesDataset(10, 32, 1), None, 4), tiny_vqgan, shapes_clip, {}, shard_size=4)
    dataset = TokenCacheDataset(tmp_path / "train")
    batches = list(DataLoader(Subset(dataset, range(1, 10)), batch_size=3))
    whole = dataset.batch(range(1, 10))
    for name in ("indices", "condition"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), whole[name])
    with pytest.raises(TypeError, match=r"list must implement clipgen\.data\.source\.ImageSource"):
        encode(tmp_path / "other", ImageDataModule([0] * 10, None, 4), tiny_vqgan, shapes_clip, {})


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_would_be_taken_for_something_else(pipe, tiny_transformer, tiny_vqgan, images):
    e, indices = torch.randn(2, 64), torch.zeros(2, 16, dtype=torch.int64)
    for call, message in (
        (lambda: tiny_vqgan.decode(indices), r"indices must be \(B, h, w\), got \(2, 16\)"),
        (lambda: tiny_transformer(indices.view(2, 4, 4), e), r"indices must be \(B, T\)"),
        (lambda: tiny_transformer.sample(e[0]), r"clip_embedding must be \(B, 64\), got \(64,\)"),
        (lambda: tiny_transformer.sample(e[:0]), r"clip_embedding must be \(B, 64\), got \(0, 64\)"),
        (lambda: tiny_transformer.sample(e, prefix=indices[:1]), r"prefix must be \(2, P\) with P at most 16"),
        (lambda: tiny_transformer.sample(e, uniforms=torch.rand(2, 3)), r"uniforms must be \(2, 16\), got \(2, 3\)"),
        (lambda: pipe.transformer.encode(torch.zeros(1, 3, 16, 64)), "images must be square"),
        (lambda: pipe.interpolate("", "a red star"), "prompt must not be empty"),
        (
            lambda: measure_batch(lambda *_: {}, (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), []), lambda n: None),
            r"images must be \(B, 3, H, W\) floats in \[-1, 1\], got uint8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for arguments in (dict(seed=torch.Generator()), dict(seed=1.5), dict(top_k=None), dict(top_p="much")):
        with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be a"):
            pipe("a red star", **arguments)


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
@pytest.mark.parametrize(
    ("rows", "got"),
    [(lambda i: (i, 3), "a list"), (lambda i: i, "a Tensor"), (lambda i: {"pixels": i}, "one with pixels")],
)
def test_batches_of_other_libraries(tiny_vqgan, tiny_transformer, shapes_clip, images, stage, rows, got):
    """Such as torchvision's, of (image, label), whose values lie in [0, 1]."""
    module = tiny_vqgan if stage == "vqgan" else tiny_transformer.attach_encoders(tiny_vqgan, shapes_clip)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match=rf'a batch must be {{"images": \(B, 3, H, W\) in \[-1, 1\]}}, got {got}'):
        trainer.fit(module, DataLoader([rows(image) for image in images], 4))


def test_features_that_are_compared_have_a_name(tmp_path, images):
    measure = ImageMetrics(Features(lambda pixels: pixels.mean((2, 3))), radii=(0,))
    with pytest.raises(ValueError, match="features must have an identity"):
        evaluate(tmp_path, None, measure, ShapesDataset(4))


# --------------------------------------------------------------------------------------------------------------- places


def test_what_a_pipeline_does_not_own_stays(tmp_path, pipe):
    (tmp_path / "README.md").write_text("my notes")
    pipe.save(tmp_path).joinpath("clip").mkdir(exist_ok=True)
    assert (tmp_path / "README.md").read_text() == "my notes"
    (tmp_path / "clip" / "thesis.txt").write_text("years")
    shutil.copytree(BUNDLED_CLIPS["shapes"], tmp_path / "mine")
    other = TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(tmp_path / "mine")))
    with pytest.raises(FileExistsError, match="clip exists and is no CLIP"):
        other.save(tmp_path)
    assert (tmp_path / "clip" / "thesis.txt").read_text() == "years"


def test_a_clip_is_found_again_from_another_folder(tmp_path, monkeypatch, pipe):
    shutil.copytree(BUNDLED_CLIPS["shapes"], tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    clip = FrozenCLIP("mine")
    os.chdir("/")
    TextToImage(pipe.vqgan, pipe.transformer, clip).save(tmp_path / "pipe")
    assert TextToImage.load(tmp_path / "pipe").clip.model_name == str(tmp_path / "pipe" / "clip")


# --------------------------------------------------------------------------------------------------- floats and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gumbel_codes_in_other_floats(dtype):
    quantizer = GumbelQuantizer(16, 8).to(dtype).eval()
    assert quantizer(torch.randn(2, 8, 3, 3, dtype=dtype)).indices.shape == (2, 3, 3)


def test_a_default_device_is_not_where_chance_lives():
    expected = per_sample_uniforms([3, 4], 5)
    with torch.device("meta"):
        assert torch.equal(per_sample_uniforms([3, 4], 5), expected)
    assert per_sample_seeds((3, 4), 2) == per_sample_seeds(torch.tensor([3, 4]), 2) == [3, 4]

"""The public API in a notebook or another program: signatures, subclasses, custom loops and loaders, copies."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, changed, weights_of
from models import TRANSFORMER_SIZES, VQGAN_SECTIONS, VQGAN_SIZES, make_transformer, make_vqgan, nested
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

import clipgen.vqgan
from clipgen import ConditionalTransformer, FrozenCLIP, TextToImage
from clipgen.bundled import BUNDLED
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.folder import ImageFolder
from clipgen.data.shapes import ShapesDataset
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.feature_store import measure_batch
from clipgen.evaluation.features import Features
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.run import evaluate
from clipgen.models.quantizers import GumbelQuantizer
from clipgen.precompute import write_token_cache
from clipgen.sampling import per_sample_seeds, per_sample_uniforms
from clipgen.sampling_params import SamplingParams
from clipgen.vqgan import VQGAN


def make_gan(model_class: type[VQGAN] = VQGAN, **flat) -> VQGAN:
    torch.manual_seed(1)
    settings = VQGAN_SIZES | dict(gan_weight=0.5, gan_start_step=0) | flat
    return model_class(**nested(VQGAN_SECTIONS, settings))


def loader(images: torch.Tensor, batch_size: int = 4) -> DataLoader:
    return DataLoader([{"images": image} for image in images], batch_size)


def trained(module: pl.LightningModule, images: torch.Tensor, steps: int = 2) -> pl.Trainer:
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", **QUIET)
    trainer.fit(module, loader(images))
    return trainer


# ----------------------------------------------------------------------------------------------------------- signatures

SAMPLING = dict(temperature=0.9, top_k=7, top_p=0.8, guidance_scale=2.0)


def keyword_only(function) -> set[str]:
    """Return the names of the arguments that must be passed by name."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_pipeline_takes_sampling_parameters_by_name(pipe):
    results = pipe("a red star", num_images=2, rerank_from=3, seed=5, **SAMPLING)
    assert len(results) == 2
    assert all(image.info.items() >= SAMPLING.items() for image in results)
    assert {"rerank_from", "seed", "outpaint", "keep_fraction"} <= keyword_only(TextToImage.__call__)
    assert len(pipe("a red star", 3, seed=0)) == 3 and len(pipe(prompt="a red star")) == 1


def test_transformer_takes_sampling_parameters_by_name(tiny_transformer):
    e = nn.functional.normalize(torch.randn(2, 64), dim=-1)
    indices = tiny_transformer.sample(e, seed=3, **SAMPLING)
    assert indices.shape == (2, 16) and indices.dtype == torch.int64
    assert torch.equal(tiny_transformer.sample(e, SamplingParams(**SAMPLING), seed=3), indices)
    assert torch.equal(tiny_transformer.sample(clip_embedding=e, seed=3, **SAMPLING), indices)
    assert {"seed", "uniforms", "prefix"} <= keyword_only(ConditionalTransformer.sample)


def test_default_sampling_parameters_are_the_papers(tiny_transformer):
    e = nn.functional.normalize(torch.randn(2, 64), dim=-1)
    defaults = dict(temperature=1.0, top_k=300, top_p=1.0, guidance_scale=1.0)
    assert torch.equal(tiny_transformer.sample(e, seed=3), tiny_transformer.sample(e, seed=3, **defaults))


def test_unknown_sampling_parameters_raise_type_error(pipe, tiny_transformer):
    message = r"must be one of temperature, top_k, .*, got tempreature$"
    e = pipe.embed("a red star")
    for generate in (
        lambda: pipe("a red star", tempreature=0.5),
        lambda: pipe.interpolate("a red star", "a blue ring", tempreature=0.5),
        lambda: pipe.generate(e, tempreature=0.5),
        lambda: tiny_transformer.sample(e, tempreature=0.5),
        lambda: tiny_transformer.sample(e, SamplingParams(), tempreature=0.5),
    ):
        with pytest.raises(TypeError, match=message):
            generate()


# ----------------------------------------------------------------------------------------------------------- subclasses


class DarkVQGAN(VQGAN):
    """A VQGAN with another loss term, which is low for dark reconstructions."""

    def autoencoder_loss(self, images, reconstruction, quantized):
        darkness = {"dark_loss": 100 * reconstruction.mean()}
        return super().autoencoder_loss(images, reconstruction, quantized) | darkness


class WithoutSchedules(VQGAN):
    def configure_optimizers(self):
        return super().configure_optimizers()[0]


@pytest.mark.parametrize("gan_weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_subclass_adds_a_loss(images, gan_weight):
    settings = dict(gan_weight=gan_weight, dead_code_reset_after=0)  # a reset draws random numbers
    plain = make_gan(VQGAN, **settings)
    dark = make_gan(DarkVQGAN, **settings)
    trained(plain, images)
    trained(dark, images)
    assert "autoencoder.decoder.conv_out.weight" in changed(dark, weights_of(plain))


@pytest.mark.slow
def test_subclass_configures_its_own_optimizers(images):
    vqgan = make_gan(WithoutSchedules)
    before = weights_of(vqgan)
    trained(vqgan, images, 1)
    assert changed(vqgan, before)


@pytest.mark.slow
def test_subclass_and_base_class_load_each_others_files(tmp_path, images):
    vqgan = make_gan(DarkVQGAN)
    trained(vqgan, images).save_checkpoint(tmp_path / "last.ckpt")
    vqgan.eval().save(tmp_path / "vqgan")
    for path in (tmp_path / "vqgan", tmp_path / "last.ckpt"):
        for model_class in (VQGAN, DarkVQGAN):
            again = model_class.load(path)
            assert type(again) is model_class and torch.equal(again.encode(images), vqgan.encode(images))


class Adapted(nn.Module):
    """A layer with an adapter, as in LoRA; ``weight`` is the weight of the layer itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.adapter = nn.Linear(*layer.weight.shape, bias=False)
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 5 * self.adapter(x)


def test_sampling_applies_adapters(tiny_transformer):
    transformer = copy.deepcopy(tiny_transformer).eval()
    e = nn.functional.normalize(torch.randn(3, 64), dim=-1)
    before = transformer.sample(e, temperature=0)
    block = transformer.gpt.transformer.h[0]
    block.attn.c_attn = Adapted(block.attn.c_attn)
    block.mlp.c_fc = Adapted(block.mlp.c_fc)
    indices = transformer.sample(e, temperature=0)
    assert not torch.equal(indices, before)
    with torch.no_grad():
        assert torch.equal(transformer(indices, e).argmax(-1), indices)


# ------------------------------------------------------------------------------------------------- custom training loop


@pytest.mark.parametrize("stage", [1, 2])
def test_ema_is_unused_before_its_first_update(tmp_path, images, stage):
    model = make_gan(ema_decay=0.9) if stage == 1 else make_transformer(**TRANSFORMER_SIZES, ema_decay=0.9)
    with torch.no_grad():
        for p in model.parameters():  # a training loop without Lightning
            if p.requires_grad:
                p.add_(0.1)
    again = type(model).load(model.eval().save(tmp_path / "model"))
    if stage == 1:
        assert torch.equal(again(images), model(images)) and torch.equal(model.active_model(images)[0], model(images))
        assert not changed(again.autoencoder, weights_of(model.autoencoder))
    else:
        assert not changed(again.gpt, weights_of(model.gpt)) and model.eval_model is model.gpt


def test_fine_tuning_keeps_the_codes(tmp_path, tiny_vqgan, images):
    settings = VQGAN_SIZES | dict(kmeans_iters=5, learning_rate=0.0, dead_code_reset_after=0)
    vqgan = make_vqgan(**settings)
    vqgan.load_state_dict(tiny_vqgan.state_dict())
    again = VQGAN.load(vqgan.save(tmp_path / "vqgan"))
    trained(again, images, 1)
    assert torch.equal(again.eval().encode(images), tiny_vqgan.encode(images))


def test_training_continues_without_a_saved_discriminator(tmp_path, images, caplog):
    again = VQGAN.load(make_gan().save(tmp_path / "vqgan"))
    trained(again, images).save_checkpoint(tmp_path / "last.ckpt")
    assert "The checkpoint has no discriminator; training continues without the adversarial loss" in caplog.text
    assert torch.equal(VQGAN.load(tmp_path / "last.ckpt")(images), again.eval()(images))


def test_perceptual_loss_works_outside_of_training(monkeypatch, images):
    class Distance(nn.Module):
        def forward(self, a, b):
            return (a - b).abs().flatten(1).mean(1)

    monkeypatch.setattr(clipgen.vqgan, "load_lpips", lambda weights: Distance())
    vqgan = make_gan(perceptual_weight=2.0).eval()
    reconstruction, quantized = vqgan.autoencode(images)
    expected = 2 * (images - reconstruction).abs().mean()
    torch.testing.assert_close(vqgan.autoencoder_loss(images, reconstruction, quantized)["perceptual_loss"], expected)
    (logged,) = pl.Trainer(accelerator="cpu", **QUIET).validate(vqgan, loader(images, 8), verbose=False)
    assert logged["val/perceptual_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_settings_of_other_types_become_plain_values(tmp_path, images):
    vqgan = make_gan(learning_rate=np.float32(1e-3), vgg_weights=Path("vgg.pth"), betas=np.array([0.5, 0.9]))
    assert vqgan.hparams["loss"]["vgg_weights"] == "vgg.pth"
    assert vqgan.hparams["optimizer"]["betas"] == [0.5, 0.9]
    trained(vqgan, images).save_checkpoint(tmp_path / "last.ckpt")
    VQGAN.load(tmp_path / "last.ckpt").save(tmp_path / "vqgan")


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow)])
def test_unsupported_precisions_of_a_gan_raise(images, precision):
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", precision=precision, **QUIET)
    with pytest.raises(ValueError, match=f"trainer.precision must be 32-true or bf16-mixed, got {precision}$"):
        trainer.fit(make_gan(), loader(images))


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.slow
def test_copies_of_a_compiled_model_have_their_own_weights(images):
    vqgan = make_gan(compile=True).eval()
    vqgan.apply_speed_options_()
    other, pickled = copy.deepcopy(vqgan), pickle.loads(pickle.dumps(vqgan))
    expected = VQGAN(**vqgan.hparams | {"compile": False}).eval()
    expected.load_state_dict(vqgan.state_dict())
    with torch.no_grad():
        for p in vqgan.parameters():
            p.zero_()
        z = torch.randn(1, 32, 4, 4)
        features = expected.autoencoder.decoder.forward_features(z)
        for copied in (other, pickled):
            torch.testing.assert_close(copied.autoencoder.decoder.forward_features(z), features)


@pytest.mark.slow
def test_trained_transformer_can_be_pickled(tiny_vqgan, shapes_clip, images):
    transformer = make_transformer(**TRANSFORMER_SIZES, schedule="cosine").attach_encoders(tiny_vqgan, shapes_clip)
    trained(transformer, images)
    assert not changed(pickle.loads(pickle.dumps(transformer)), weights_of(transformer))


# ----------------------------------------------------------------------------------------------------------------- data


def test_plain_loader_augments_differently_every_time(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path, 16, train=True)
    assert len({folder[0]["images"].sum().item() for _ in range(8)}) > 4
    assert torch.equal(folder[3, 0]["images"], folder[3, 0]["images"])


def test_token_cache_works_in_a_plain_loader(tmp_path, tiny_vqgan, shapes_clip):
    write_token_cache(
        tmp_path, ImageDataModule(ShapesDataset(10, 32, 1), None, 4), tiny_vqgan, shapes_clip, {}, shard_size=4
    )
    dataset = TokenCacheDataset(tmp_path / "train")
    batches = list(DataLoader(Subset(dataset, range(1, 10)), batch_size=3))
    expected = dataset.batch(range(1, 10))
    for name in ("indices", "condition"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])
    with pytest.raises(TypeError, match=r"list must implement clipgen\.data\.source\.ImageSource"):
        write_token_cache(tmp_path / "other", ImageDataModule([0] * 10, None, 4), tiny_vqgan, shapes_clip, {})


# ------------------------------------------------------------------------------------------------------------- errors


def test_wrong_input_types_raise(pipe, tiny_transformer, tiny_vqgan, images):
    e, indices = torch.randn(2, 64), torch.zeros(2, 16, dtype=torch.int64)
    for call, message in (
        (lambda: tiny_vqgan.decode(indices), r"indices must be \(B, h, w\), got \(2, 16\)"),
        (lambda: tiny_transformer(indices.view(2, 4, 4), e), r"indices must be \(B, T\)"),
        (lambda: tiny_transformer.sample(e[0]), r"clip_embedding must be \(B, 64\), got \(64,\)"),
        (lambda: tiny_transformer.sample(e[:0]), r"clip_embedding must be \(B, 64\), got \(0, 64\)"),
        (lambda: tiny_transformer.sample(e, prefix=indices[:1]), r"prefix must be \(2, P\) with P at most 16"),
        (lambda: tiny_transformer.sample(e, uniforms=torch.rand(2, 3)), r"uniforms must be \(2, 16\), got \(2, 3\)"),
        (lambda: pipe.transformer.encode_images(torch.zeros(1, 3, 16, 64)), "images must be square"),
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
def test_batches_of_other_libraries_raise(tiny_vqgan, tiny_transformer, shapes_clip, images, stage, rows, got):
    """Such as (image, label) pairs of torchvision, whose values lie in [0, 1]."""
    module = tiny_vqgan if stage == "vqgan" else tiny_transformer.attach_encoders(tiny_vqgan, shapes_clip)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match=rf'a batch must be {{"images": \(B, 3, H, W\) in \[-1, 1\]}}, got {got}'):
        trainer.fit(module, DataLoader([rows(image) for image in images], 4))


def test_compared_features_need_an_identity(tmp_path, images):
    measure = ImageMetrics(Features(lambda pixels: pixels.mean((2, 3))), radii=(0,))
    with pytest.raises(ValueError, match="features must have an identity"):
        evaluate(tmp_path, None, measure, ShapesDataset(4))


# -------------------------------------------------------------------------------------------------------------- folders


def test_saving_keeps_files_of_others(tmp_path, pipe):
    (tmp_path / "README.md").write_text("my notes")
    pipe.save(tmp_path).joinpath("clip").mkdir(exist_ok=True)
    assert (tmp_path / "README.md").read_text() == "my notes"
    (tmp_path / "clip" / "thesis.txt").write_text("years")
    shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "mine")
    other = TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(tmp_path / "mine")))
    with pytest.raises(FileExistsError, match="clip exists and is not a CLIP folder"):
        other.save(tmp_path)
    assert (tmp_path / "clip" / "thesis.txt").read_text() == "years"


def test_clip_folder_is_found_from_another_working_directory(tmp_path, monkeypatch, pipe):
    shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    clip = FrozenCLIP("mine")
    os.chdir("/")
    TextToImage(pipe.vqgan, pipe.transformer, clip).save(tmp_path / "pipe")
    assert TextToImage.load(tmp_path / "pipe").clip.model_name == str(tmp_path / "pipe" / "clip")


# --------------------------------------------------------------------------------------------------- floats and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gumbel_quantizer_in_other_dtypes(dtype):
    quantizer = GumbelQuantizer(16, 8).to(dtype).eval()
    assert quantizer(torch.randn(2, 8, 3, 3, dtype=dtype)).indices.shape == (2, 3, 3)


def test_sampling_is_independent_of_the_default_device():
    expected = per_sample_uniforms([3, 4], 5)
    with torch.device("meta"):
        assert torch.equal(per_sample_uniforms([3, 4], 5), expected)
    assert per_sample_seeds((3, 4), 2) == per_sample_seeds(torch.tensor([3, 4]), 2) == [3, 4]

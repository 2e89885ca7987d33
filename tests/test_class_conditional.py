"""The class-conditional transformer and its generator."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import TRANSFORMER
from models import TRANSFORMER_SIZES, make_class_transformer
from torch import nn

from clipgen import sampling
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

NAMES = ["red", "green", "blue"]


@pytest.fixture
def class_generator(tiny_vqgan) -> ClassConditionalGenerator:
    """Untrained, with weights so large that its images differ clearly."""
    transformer = make_class_transformer(**{**TRANSFORMER_SIZES, "clip_dim": 3}, class_names=NAMES)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ClassConditionalGenerator(tiny_vqgan, transformer.eval())


def test_generator_samples_with_one_hot_classes(class_generator, tiny_vqgan):
    classes = torch.tensor([2, 0, 2, 1])
    one_hot = torch.eye(3)[classes]
    indices = class_generator.transformer.sample(one_hot, seed=5)
    images = tiny_vqgan.decode(indices.view(4, 4, 4)).clamp(-1, 1).detach()
    torch.testing.assert_close(class_generator.generate(classes, seed=5), images, atol=1e-5, rtol=0)
    assert not torch.equal(class_generator.generate(torch.tensor([1, 0, 2, 1]), seed=5)[0], images[0])


def test_guidance_matches_the_transformer(class_generator, tiny_vqgan):
    guided = ClassConditionalGenerator(
        tiny_vqgan, class_generator.transformer, SamplingParams(guidance_scale=3.0, top_k=5)
    )
    indices = class_generator.transformer.sample(torch.eye(3), seed=5, guidance_scale=3.0, top_k=5)
    expected = tiny_vqgan.decode(indices.view(3, 4, 4)).clamp(-1, 1).detach()
    torch.testing.assert_close(guided.generate(torch.arange(3), seed=5), expected, atol=1e-5, rtol=0)


def test_noise_determines_the_image(class_generator):
    """The normal CDF of the noise is the uniform number, so noise made of uniforms gives those uniforms' images."""
    uniforms = sampling.per_sample_uniforms([5, 6, 7], 16).double()
    noise = math.sqrt(2) * torch.erfinv(2 * uniforms - 1)
    assert class_generator.noise_dim == 16 and class_generator.class_names == NAMES
    images = class_generator(noise, torch.arange(3))
    assert torch.equal(images, class_generator.generate(torch.arange(3), seed=5)) and images.abs().max() <= 1
    torch.testing.assert_close(class_generator(noise[[2, 0]], torch.tensor([2, 0])), images[[2, 0]])
    far = torch.full((1, 16), 50.0)  # the CDF is 1 in floating point
    assert class_generator(far, torch.tensor([0])).isfinite().all()


def test_class_index_by_name_and_number(class_generator):
    assert (
        class_generator.class_index("green") == class_generator.class_index("1") == class_generator.class_index(1) == 1
    )
    for label in ("black", "3", "-1", ""):
        with pytest.raises(ValueError, match="class must be below 3 or one of red, green, blue; got"):
            class_generator.class_index(label)
    with pytest.raises(ValueError, match=r"class_indices must be in \[0, 3\), got \[3\]"):
        class_generator.generate(torch.tensor([3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_loss_weight": 0.2}, "clip_loss.weight must be 0 with data.conditioning=class, got 0.2"),
        ({"cond_noise_cosine": 0.9}, "conditioning.noise_cosine must be 1 for classes, got 0.9"),
        ({"clip_dim": 4}, "clip_dim must be 3, the number of classes, got 4"),
    ],
)
def test_arguments_that_need_clip_embeddings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_class_transformer(**{**TRANSFORMER_SIZES, "clip_dim": 3, **arguments}, class_names=NAMES)


def test_training_with_the_command(call, class_run):
    assert {"vqgan", "clip.json", "label_transformer", "checkpoints"} <= {path.name for path in class_run.iterdir()}
    model = ClassConditionalGenerator.load(class_run)
    assert model.class_names == [str(attributes) for attributes in ALL_ATTRIBUTES]
    assert model.transformer.conditioning_config.noise_cosine == 1  # the noise of the recipe is for CLIP embeddings
    images = model.generate(torch.tensor([0, 287]), seed=1)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images[1:], model.generate(torch.tensor([287]), seed=2))
    for path in (class_run / "checkpoints" / "last.ckpt", class_run / "label_transformer"):
        assert ClassConditionalGenerator.load(path).transformer.clip_dim == 288
    result = call(
        "clipgen-train",
        *TRANSFORMER,
        "data=cached",
        "data.root=cache",
        "data.conditioning=class",
        "output=on",
        "resume=run",
        "trainer.max_steps=6",
    )
    assert result.code == 0 and ClassConditionalGenerator.load("on").class_names == model.class_names, result.stderr


def test_image_settings_without_effect_on_a_cache_are_named(class_run, call, caplog):
    cache = ["data=cached", "data.root=cache", "data.conditioning=class", "data.image_size=64"]
    recipe = ["experiment=cifar10_quick", "clip=shapes"]
    result = call("clipgen-train", *TRANSFORMER, *recipe, *cache, "output=other")
    assert result.code == 0 and "data.image_size has no effect with data=cached" in caplog.text, result.stderr


def test_the_sampling_parameters_of_a_run_are_the_defaults(class_run, tmp_path):
    run = shutil.copytree(class_run, tmp_path / "copy")
    (run / "sampling.json").write_text('{"top_k": 7, "top_p": 0.5}')
    assert ClassConditionalGenerator.load(run).params == SamplingParams(top_k=7, top_p=0.5)
    assert ClassConditionalGenerator.load(run, top_k=9).params == SamplingParams(top_k=9, top_p=0.5)
    assert ClassConditionalGenerator.load(run, SamplingParams()).params == SamplingParams()


def test_class_conditional_run_is_not_a_text_model(call, class_run):
    needed = "but a ConditionalTransformer is needed"
    for path in (class_run, class_run / "label_transformer", class_run / "checkpoints" / "last.ckpt"):
        with pytest.raises(ValueError, match=f"is a ClassConditionalTransformer checkpoint .*, {needed}"):
            TextToImage.load(path)
    result = call("clipgen-sample", "--checkpoint", "run", "--prompt", "x")
    assert result.code == 1 and needed in result.stderr and result.stderr.count("\n") == 1
    for checkpoint in (class_run / "checkpoints").iterdir():
        checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="it contains a ClassConditionalTransformer"):
        TextToImage.load(class_run)


def test_text_model_is_not_a_class_conditional_run(pipe, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no ClassConditionalTransformer checkpoint: .*; it contains a ConditionalTransformer"
    ):
        ClassConditionalGenerator.load(pipe.save(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.clip_loss.weight=0.2", "clip_loss.weight must be 0 with data.conditioning=class, got 0.2"),
        ("model.clip_dim=7", "clip_dim must be 288"),
        ("model.n_layer=x", "model.n_layer must be int, got 'x'"),
        ("data.conditioning=text", "conditioning must be 'clip' or 'class', got 'text'"),
    ],
)
def test_invalid_training_arguments_are_one_line(call, class_run, argument, message):
    arguments = ["data=cached", "data.root=cache", "data.conditioning=class", argument, "output=other"]
    result = call("clipgen-train", *TRANSFORMER, *arguments)
    assert result.code == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not Path("other").exists()

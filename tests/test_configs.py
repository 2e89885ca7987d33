"""The YAML files: all compose, keys are fields of the dataclasses, and the paper's hyperparameters are the paper's."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from models import TRANSFORMER_SECTIONS, VQGAN_SECTIONS
from omegaconf import OmegaConf

from clipgen.cli.config import compose_config, config_dir, instantiate_node
from clipgen.cli.train import PAPER_EXPERIMENTS, check_variant
from clipgen.clip import FrozenCLIP
from clipgen.data.folder import folder_data
from clipgen.data.huggingface import huggingface_data
from clipgen.data.shapes import shapes_data
from clipgen.data.webdataset import shard_data
from clipgen.models.config import GPTConfig, to_plain
from clipgen.sampling_params import SamplingParams
from clipgen.training import callbacks
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

STAGES = ("vqgan", "transformer")
EXPERIMENTS = ("shapes", "cifar10", "cifar10_quick", "photos", "coco", "imagenet", "modern")
NEEDED = {
    "modern": ["data.root=x"],
    "photos": ["data.root=x"],
    "coco": ["data.root=x"],
    "imagenet": ["data.train_urls=x", "data.val_urls=x"],
}


def group(name: str) -> dict[str, dict]:
    """Return the parsed files of a configuration group, by name."""
    return {file.stem: yaml.safe_load(file.read_text()) or {} for file in Path(config_dir(), name).glob("*.yaml")}


def experiment(stage: str, name: str):
    return compose_config(
        f"stage={stage}", f"experiment={name}", *NEEDED.get(name, []), *["vqgan=x"] * (stage != "vqgan")
    )


def values(node: dict) -> set[str]:
    return set(node) - {"_target_"}


def arguments(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# ------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_stage_of_every_experiment_composes(stage, name):
    config = experiment(stage, name)
    OmegaConf.resolve(config)
    assert config.stage_name == stage and config.output.startswith(f"outputs/{stage}/")
    assert not OmegaConf.missing_keys(config)
    assert config.trainer.max_steps > 0 or config.trainer.max_epochs > 0  # otherwise it would never end


def test_all_experiments_and_stages_are_listed():
    assert set(group("experiment")) == set(EXPERIMENTS) and set(group("stage")) == set(STAGES)
    recipes = {f"{name}_{stage}" for name in EXPERIMENTS for stage in STAGES}
    assert set(group("recipe")) == recipes | {"hfailab_transformer"}
    assert set(group("variant_recipe")) == {f"{name}_{stage}" for name in group("variant") for stage in STAGES}


@pytest.mark.parametrize("name", ["csv", "none", "tensorboard", "wandb"])
def test_logger_keys_are_constructor_arguments(name):
    node = compose_config("stage=vqgan", f"logger={name}").logger
    if name != "none":
        assert values(node) <= set(arguments(get_object(node["_target_"]).__init__))


# ----------------------------------------------------------------------------------------- keys are arguments or fields


SECTIONS = {"vqgan": VQGAN_SECTIONS, "transformer": TRANSFORMER_SECTIONS}


@pytest.mark.parametrize(("stage", "model"), [("vqgan", VQGAN), ("transformer", ConditionalTransformer)])
def test_model_keys_are_constructor_arguments(stage, model):
    node = group("stage")[stage]["model"]
    assert get_object(node["_target_"]) is model
    network = {field.name for field in fields(GPTConfig)} if stage == "transformer" else set()
    assert values(node) == set(arguments(model.__init__)) - {"network"} | network


@pytest.mark.parametrize("stage", STAGES)
def test_stage_keys_are_in_the_order_of_the_dataclass_fields(stage):
    model = group("stage")[stage]["model"]
    for section, (config_class, _) in SECTIONS[stage].items():
        names = [f.name for f in fields(config_class)]
        keys = [key for key in (model[section] if section else model) if key in names]
        assert keys == names
    constructor_arguments = arguments(get_object(model["_target_"]).__init__)
    expected = [name for name in constructor_arguments if name in model]
    assert [key for key in model if key in constructor_arguments] == expected


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_defaults_are_the_dataclass_defaults(stage):
    """Except for the values that YAML takes from the data or the frozen models."""
    model = group("stage")[stage]["model"]
    filled_in = {"resolution"} if stage == "vqgan" else {"codebook_size", "num_tokens", "clip_dim"}
    for section, (config_class, _) in SECTIONS[stage].items():
        node = model[section] if section else model
        defaults = to_plain(config_class())
        for key in set(defaults) - filled_in:
            expected = pytest.approx(defaults[key]) if isinstance(defaults[key], float) else defaults[key]
            assert node[key] == expected, f"{section}.{key}"
        if section:
            assert set(node) == set(defaults)


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("shapes", shapes_data),
        ("folder", folder_data),
        ("webdataset", shard_data),
        ("huggingface", huggingface_data),
    ],
)
def test_data_keys_are_factory_arguments(name, factory):
    node = group("data")[name]
    assert get_object(node["_target_"]) is factory and values(node) == set(arguments(factory))


def test_other_keys_are_arguments():
    for name, node in group("clip").items():
        assert get_object(node["_target_"]) is FrozenCLIP, name
        assert values(node) == set(arguments(FrozenCLIP.__init__))
    config = compose_config("stage=vqgan")
    assert values(config.image_logger) == set(arguments(callbacks.ImageLogger.__init__)) - {"folder", "overrides"} | {
        field.name for field in fields(SamplingParams)
    }
    projector = compose_config("stage=transformer").projector
    assert values(projector) == set(arguments(callbacks.ProjectorBuilder.__init__)) - {"folder"}
    assert values(config.checkpoint) == set(arguments(callbacks.checkpoint_callbacks)) - {"folder", "monitor"}
    assert values(config.trainer) <= set(arguments(get_object(config.trainer["_target_"]).__init__))


@pytest.mark.parametrize("folder", ["recipe", "variant_recipe"])
@pytest.mark.parametrize("stage", STAGES)
def test_recipe_keys_exist(folder, stage):
    for name, recipe in group(folder).items():
        if name.endswith(stage):
            assert_recipe_keys_exist(recipe, stage)


def assert_recipe_keys_exist(recipe: dict, stage: str) -> None:
    config = compose_config(f"stage={stage}")
    for node in ("model", "trainer", "image_logger"):
        assert_known_keys(recipe.get(node, {}), config[node], node)


def assert_known_keys(node: dict, known: dict, path: str) -> None:
    for key, value in node.items():
        assert key in known, f"{path}.{key}"
        if isinstance(value, dict):
            assert_known_keys(value, known[key], f"{path}.{key}")


@pytest.mark.parametrize("name", sorted(group("quantizer")))
def test_all_quantizers_compose_and_build(name):
    config = compose_config("stage=vqgan", "experiment=cifar10", f"quantizer={name}")
    with torch.device("meta"):
        vqgan = instantiate_node(config.model)
    assert vqgan.quantizer_config.type == {"paper": "euclidean"}.get(name, name)


@pytest.mark.parametrize(
    ("name", "gpt2_parameters", "parameters"),
    [
        ("gpt2-small", 124_439_808, None),
        ("gpt2-medium", 354_823_168, None),
        ("gpt2-large", 774_030_080, None),
        ("gpt2-xl", 1_557_611_200, None),
        ("gpt2-xl-clipgen", None, 1_386.3e6),
    ],
)
def test_model_sizes_have_the_published_parameter_counts(name, gpt2_parameters, parameters):
    """With GPT-2's vocabulary and positions, OpenAI's sizes have as many parameters as GPT-2."""
    config = compose_config("stage=transformer", "experiment=coco", "data.root=x", "vqgan=x", f"model_size={name}")
    with torch.device("meta"):
        transformer = instantiate_node(config.model, codebook_size=50257, num_tokens=1024, clip_dim=512)
        own_vocabulary = instantiate_node(config.model, codebook_size=16384, num_tokens=256, clip_dim=512)
    if gpt2_parameters:
        assert count(transformer) - count(transformer.gpt.clip_proj) == gpt2_parameters
    else:
        assert count(own_vocabulary) == pytest.approx(parameters, rel=0.002)
    assert set(group("model_size")[name]) == {"model"} and set(group("model_size")[name]["model"]) == {
        "n_layer",
        "n_head",
        "n_embd",
    }


def test_all_model_sizes_are_listed():
    assert set(group("model_size")) == {"gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-xl-clipgen"}


@pytest.mark.parametrize(("image_size", "tokens"), [(64, 64), (128, 256)])
def test_recipe_for_small_photographs_has_64_to_256_tokens(image_size, tokens):
    config = compose_config("stage=vqgan", "experiment=photos", "data.root=x", f"data.image_size={image_size}")
    with torch.device("meta"):
        vqgan = instantiate_node(config.model)
        latents = vqgan.autoencoder.encode(torch.zeros(1, 3, image_size, image_size))
        scores = vqgan.discriminator(torch.zeros(1, 3, image_size, image_size))
    assert vqgan.downsampling == 8 and latents[0, 0].numel() == tokens
    assert scores[0].numel() > 1  # the discriminator scores patches


def test_modern_tokenizer_has_16384_codes_and_f_16():
    """It has 16384 codes of 8 dimensions on a sphere and f = 16, and is trained in bf16, and compiled on a GPU."""
    config = compose_config("stage=vqgan", "experiment=modern", "data.root=x")
    with torch.device("meta"):
        vqgan = instantiate_node(config.model)
    assert vqgan.downsampling == 16 and vqgan.quantizer_config.type == "cosine"
    assert vqgan.hparams["compile"] == "auto"
    assert count(vqgan.autoencoder) == pytest.approx(71.9e6, rel=0.01)
    assert config.trainer.precision == "bf16-mixed" and config.model.optimizer.ema_decay > 0


# ---------------------------------------------------------------------------------------- the paper's hyperparameters


@pytest.mark.parametrize("name", ["coco", "imagenet"])
def test_stage_1_has_the_papers_hyperparameters(name):
    config = experiment("vqgan", name)
    model = config.model
    quantizer, gan, optimizer = model.quantizer, model.gan, model.optimizer
    assert (quantizer.codebook_size, quantizer.codebook_dim, quantizer.type) == (16384, 256, "euclidean")
    assert (gan.num_layers, gan.start_step, gan.disc_only_steps) == (3, 25_000, 0)
    assert model.loss.perceptual_weight > 0 and gan.weight > 0 and model.autoencoder.dropout == 0
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (4.5e-6, "constant", 0)
    assert (config.data.batch_size, config.data.image_size, config.trainer.max_epochs) == (16, 256, 100)
    assert config.data.flip is False  # supplement A: resize and random crop
    assert (config.clip.model_name, config.clip.pretrained) == ("ViT-B-32-quickgelu", "openai")
    with torch.device("meta"):
        vqgan = instantiate_node(model)
    assert vqgan.downsampling == 16
    assert count(vqgan) == pytest.approx(78.8e6, rel=0.002)
    assert count(vqgan.discriminator) == pytest.approx(2.77e6, rel=0.01)  # PatchGAN of 64 channels and 3 layers
    assert vqgan.codebook.shape == (16384, 256)


@pytest.mark.parametrize(
    ("name", "sizes", "batch_size", "max_steps", "parameters", "table_1"),
    [
        ("coco", (24, 16, 1024), 32, 1_000_000, 319.9e6, 307e6),
        ("imagenet", (48, 24, 1536), 16, 2_000_000, 1386.3e6, 1.6e9),
    ],
)
def test_stage_2_has_the_papers_hyperparameters(name, sizes, batch_size, max_steps, parameters, table_1):
    config = experiment("transformer", name)
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd) == sizes
    assert model.clip_loss.weight == 0.2
    optimizer = model.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-5, 0)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (model.conditioning.drop_prob, model.conditioning.noise_cosine) == (0, 1)  # not in the paper
    assert (config.data.batch_size, config.data.image_size, config.trainer.max_steps) == (batch_size, 256, max_steps)
    assert config.data.flip is False
    assert (config.clip.model_name, config.clip.pretrained) == ("ViT-B-32-quickgelu", "openai")
    assert (config.image_logger.top_k, config.image_logger.top_p) == (300, 1.0)
    with torch.device("meta"):
        transformer = instantiate_node(model, codebook_size=16384, num_tokens=256, clip_dim=512)
    assert count(transformer) == pytest.approx(parameters, rel=0.002)
    assert count(transformer) == pytest.approx(table_1, rel=0.15)  # the paper does not say what it counts


@pytest.mark.parametrize("name", ["coco", "imagenet"])
def test_printed_variant_of_stage_1_builds_with_the_papers_objective(name):
    config = compose_config("stage=vqgan", f"experiment={name}", *NEEDED[name], "variant=printed")
    with torch.device("meta"):
        vqgan = instantiate_node(config.model)
    loss, gan = vqgan.loss_config, vqgan.gan_config
    assert (loss.reduction, loss.reconstruction, loss.codebook_weight, loss.commitment_weight) == ("sum", "l2", 1, 1)
    assert (gan.loss, gan.adaptive, gan.weight) == ("minimax", False, 1)
    assert list(vqgan.optimizer_config.betas) == [0.9, 0.999]
    assert vqgan.quantizer_config.codebook_size == 16384 and config.trainer.max_epochs == 100
    assert config.data.get("val_fraction") == (0 if name == "coco" else None)  # the complete set of images


def test_printed_variant_belongs_to_the_papers_experiments():
    for name in PAPER_EXPERIMENTS:
        check_variant({"experiment": name, "variant": "printed"})
    check_variant({"experiment": "modern", "variant": None})
    with pytest.raises(ValueError, match=r"variant=printed needs experiment=coco or .*, got experiment=modern"):
        check_variant({"experiment": "modern", "variant": "printed"})


@pytest.mark.parametrize("name", ["coco", "imagenet"])
def test_printed_variant_of_stage_2_builds_with_the_papers_objective(name):
    config = compose_config("stage=transformer", f"experiment={name}", *NEEDED[name], "variant=printed", "vqgan=x")
    with torch.device("meta"):
        transformer = instantiate_node(config.model, codebook_size=16384, num_tokens=256, clip_dim=512)
    assert transformer.hparams["loss_reduction"] == "sum" and not transformer.gpt.scale_condition
    assert transformer.clip_loss_config.weight == 0.2 and transformer.optimizer_config.learning_rate == 1e-5


def test_recipe_of_hfailab_builds():
    config = compose_config(
        "stage=transformer", "experiment=coco", "recipe=hfailab_transformer", "data.root=x", "vqgan=x"
    )
    with torch.device("meta"):
        transformer = instantiate_node(config.model, codebook_size=16384, num_tokens=256, clip_dim=512)
    optimizer, network = transformer.optimizer_config, transformer.gpt_config
    assert optimizer.learning_rate == pytest.approx(5e-4 / 256 * config.data.batch_size)
    assert optimizer.warmup_steps == config.trainer.max_steps / 10 and not optimizer.decay_embeddings
    assert (network.weight_init, network.scale_condition, network.mlp_dropout) == ("torch", False, 0.1)
    assert (network.n_layer, network.n_head, network.n_embd) == (24, 16, 1024)  # their gpt2_medium


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

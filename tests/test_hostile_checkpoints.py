"""Other people's model files: sizes are compared before memory is used, values checked, and errors name the file."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import resource
import threading
import time
import zipfile
from collections import Counter, defaultdict
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from models import TRANSFORMER_SECTIONS, VQGAN_SECTIONS, nested
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_converters import CONFIG
from transformers import GPT2Config, GPT2Model

from clipgen.checkpoint import gpt2, pickle_stubs, safe_load, taming
from clipgen.checkpoint.model_folder import load_arguments_and_state
from clipgen.checkpoint.vgg import load_lpips
from clipgen.clip import load_open_clip
from clipgen.evaluation.features import feature_extractor
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.models.quantizers.fsq import FSQ
from clipgen.pipeline import TextToImage
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

SECTIONS = {"VQGAN": VQGAN_SECTIONS, "ConditionalTransformer": TRANSFORMER_SECTIONS}
MODELS = {"VQGAN": VQGAN, "ConditionalTransformer": ConditionalTransformer}
FIRST = "encoder.conv_in.weight"


@pytest.fixture
def little():
    """Allow 400 MB more than the process has, and five seconds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20, before[1]))
    start = time.perf_counter()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.perf_counter() - start < 5


@pytest.fixture
def folder(tiny_vqgan, tiny_transformer, tmp_path):
    """A folder of each model, by its class."""
    return {
        "VQGAN": tiny_vqgan.save(tmp_path / "vqgan"),
        "ConditionalTransformer": tiny_transformer.save(tmp_path / "transformer"),
    }


def merged(model: str, arguments: dict, **flat: object) -> dict:
    """Return the arguments of a model with some values changed, which are named as in ``make_vqgan``."""
    arguments = json.loads(json.dumps(arguments))
    for name, value in nested(SECTIONS[model], flat).items():
        arguments[name] = arguments[name] | value if isinstance(arguments.get(name), dict) else value
    return arguments


def change_config(folder: Path, **flat: object) -> Path:
    """Change arguments in a model folder."""
    config = json.loads((folder / "config.json").read_text())
    config["arguments"] = merged(config["model"], config["arguments"], **flat)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(load, *names: object) -> str:
    """The message of an error, which is one sentence that names the file."""
    with pytest.raises(ValueError) as error:
        load()
    message = str(error.value)
    assert all(str(name) in message for name in names), message
    assert "\n" not in message and len(message) < 600
    assert "can't allocate" not in message and "MemoryError" not in message
    return message


def checkpoint_of(model, path: Path, **changes: object) -> Path:
    """A training checkpoint as Lightning writes it, without what only the trainer reads."""
    content = {"clipgen_model": type(model).__name__, "hyper_parameters": dict(model.hparams)}
    content["state_dict"] = dict(model.state_dict())
    torch.save({k: v for k, v in (content | changes).items() if v is not ...}, path)
    return path


# ------------------------------------------------------------------------------------------------------------- memory

ABSURD = [
    ("VQGAN", {"codebook_size": 5_000_000}),
    ("VQGAN", {"codebook_size": 10**15}),
    ("VQGAN", {"codebook_size": 10**30}),
    ("VQGAN", {"num_res_blocks": 10**9}),
    ("VQGAN", {"num_res_blocks": 3000}),
    ("VQGAN", {"ch_mult": [1] * 3000}),
    ("VQGAN", {"ch_mult": [1] * 900}),
    ("VQGAN", {"ch": 8192}),
    ("VQGAN", {"z_channels": 10**6}),
    ("VQGAN", {"patch_size": 4096}),
    ("VQGAN", {"gan_channels": 10**6, "gan_weight": 1.0, "gan_num_layers": 10**9}),
    ("VQGAN", {"quantizer_type": "lfq", "dead_code_reset_after": 0, "codebook_dim": 10**9, "codebook_size": 2**60}),
    ("VQGAN", {"quantizer_type": "fsq", "dead_code_reset_after": 0, "fsq_levels": [1000] * 500}),
    ("ConditionalTransformer", {"n_layer": 10**9}),
    ("ConditionalTransformer", {"n_layer": 3000}),
    ("ConditionalTransformer", {"n_embd": 8192}),
    ("ConditionalTransformer", {"num_tokens": 10**6}),
    ("ConditionalTransformer", {"codebook_size": 5_000_000}),
    ("ConditionalTransformer", {"clip_dim": 10**9}),
]


@pytest.mark.parametrize(("model", "arguments"), ABSURD)
def test_absurd_sizes_of_a_configuration_cost_no_memory(folder, little, model, arguments):
    path = change_config(folder[model], **arguments)
    refused(lambda: MODELS[model].load(path), path)


def test_a_discriminator_that_is_not_in_the_file_is_not_built(folder, little):
    path = change_config(folder["VQGAN"], gan_channels=4096, gan_weight=0.5)
    vqgan = VQGAN.load(path)
    assert vqgan.discriminator is None and vqgan.gan_config.weight == 0.5


@pytest.mark.parametrize(("model", "arguments"), [ABSURD[0], ABSURD[3], ABSURD[13]])
def test_absurd_sizes_of_a_checkpoint_cost_no_memory(tmp_path, tiny_vqgan, tiny_transformer, little, model, arguments):
    made = tiny_vqgan if model == "VQGAN" else tiny_transformer
    path = checkpoint_of(made, tmp_path / "x.ckpt", hyper_parameters=merged(model, made.hparams, **arguments))
    refused(lambda: MODELS[model].load(path), path)


def test_absurd_sizes_of_tamings_configuration_cost_no_memory(tmp_path, little):
    path = taming_checkpoint(tmp_path / "last.ckpt")
    params = CONFIG["model"]["params"]
    config = {"model": CONFIG["model"] | {"params": params | {"n_embed": 10**8}}}
    refused(lambda: VQGAN.from_taming(path, config), path)


def taming_checkpoint(path: Path, wrap=lambda name: name, **beside: object) -> Path:
    state = VQGAN(**taming.convert_config(CONFIG)).autoencoder.state_dict()
    torch.save({"state_dict": {wrap(name): tensor for name, tensor in state.items()}, **beside}, path)
    return path


def strided(state):
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def test_tensors_without_memory_of_their_own_are_refused(tmp_path, shared, tiny_vqgan, little):
    state = torch.load(shared / "parity/hfailab_clip_gen/vqgan.pt", weights_only=True)["model"]
    torch.save({"model": strided(state)}, tmp_path / "vqgan.pt")
    refused(lambda: VQGAN.from_hfailab(tmp_path / "vqgan.pt"), "vqgan.pt", "claims")
    large = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"model": state | {"quantizer.embedding.weight": large}}, tmp_path / "large.pt")
    refused(lambda: VQGAN.from_hfailab(tmp_path / "large.pt"), "large.pt", "claims 4000000000000 bytes")
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt", state_dict=strided(tiny_vqgan.state_dict()))
    refused(lambda: VQGAN.load(path), path, "claims")


def test_one_storage_named_many_times_is_refused(tmp_path, tiny_vqgan):
    shared_memory = torch.zeros(100_000)
    state = {name: shared_memory[: t.numel()].view(t.shape) for name, t in tiny_vqgan.state_dict().items()}
    state |= {f"copy.{i}": shared_memory for i in range(20)}
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt", state_dict=state)
    refused(lambda: VQGAN.load(path), path, "its weights claim")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta"])
def test_tensors_that_are_not_dense_are_refused(tmp_path, tiny_vqgan, kind):
    made = {
        "sparse": lambda: torch.zeros(16, 8).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(16, 8), 1.0, 0, torch.qint8),
        "meta": lambda: torch.zeros(16, 8, device="meta"),
    }[kind]()
    state = tiny_vqgan.state_dict() | {"autoencoder.quantize.embedding.weight": made}
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt", state_dict=state)
    refused(lambda: VQGAN.load(path), path)


def test_compressed_records_are_refused_before_they_are_read(tmp_path, tiny_vqgan, little):
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    large = next(name for name in content if name.endswith("data/0"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(large, bytes(2**26))
    with zipfile.ZipFile(path, "a") as archive:
        for name in content.keys() - {large}:
            archive.writestr(name, content[name])
    assert path.stat().st_size < 2**22
    # the first record must look like torch's
    assert path.read_bytes()[:4] == b"PK\x03\x04"
    refused(lambda: VQGAN.load(path), path, "compressed")


def test_records_that_lie_over_one_another_are_refused(tmp_path, tiny_vqgan):
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        archive.filelist += [largest] * 50
        archive._didModify = True
    refused(lambda: VQGAN.load(path), path, "its records claim")


def test_numbers_of_modules_are_not_believed(tmp_path, shared, little):
    state = torch.load(shared / "parity/hfailab_clip_gen/vqgan.pt", weights_only=True)["model"]
    torch.save({"model": state | {"encoder.down.999999999.a": torch.zeros(1)}}, tmp_path / "vqgan.pt")
    refused(lambda: VQGAN.from_hfailab(tmp_path / "vqgan.pt"), "vqgan.pt", "999999999")


def test_aliases_of_a_yaml_are_refused(tmp_path, little):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "model.yaml").write_text("\n".join(lines))
    path = taming_checkpoint(tmp_path / "last.ckpt")
    refused(lambda: VQGAN.from_taming(path, tmp_path / "model.yaml"), "model.yaml", "aliases")


def test_levels_of_fsq_are_bounded():
    with pytest.raises(ValueError, match="levels must have a product of at most"):
        FSQ([1000] * 20)


# ------------------------------------------------------------------------------------------------------------- values


def poisoned(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in ("nan", "inf"):
        changed = tensor.float().clone()
        changed.view(-1)[-1] = float(kind)
        return changed
    return tensor.to({"int8": torch.int8, "bool": torch.bool, "complex": torch.complex64}[kind])


KINDS = ("nan", "inf", "int8", "bool", "complex")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "name"),
    [("VQGAN", "decoder.conv_out.weight"), ("ConditionalTransformer", "gpt.transformer.wte.weight")],
)
def test_weights_of_a_folder_must_be_finite_and_floating_point(folder, model, name, kind):
    weights = folder[model] / "model.safetensors"
    state = load_file(weights)
    save_file(state | {name: poisoned(state[name], kind)}, weights)
    message = refused(lambda: MODELS[model].load(folder[model]), folder[model], name)
    assert ("finite" if kind in ("nan", "inf") else "floating-point numbers") in message


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_checkpoint_must_be_finite_and_floating_point(tmp_path, tiny_vqgan, kind):
    name = "autoencoder.decoder.conv_out.weight"
    state = tiny_vqgan.state_dict()
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt", state_dict=state | {name: poisoned(state[name], kind)})
    refused(lambda: VQGAN.load(path), path, name)


@pytest.mark.parametrize("kind", KINDS)
def test_published_weights_must_be_finite_and_floating_point(tmp_path, shared, kind):
    for source, name in (("vqgan.pt", "decoder.conv_in.weight"), ("gpt.pt", "cond_proj.weight")):
        content = torch.load(shared / "parity/hfailab_clip_gen" / source, weights_only=True)
        content["model"][name] = poisoned(content["model"][name], kind)
        torch.save(content, tmp_path / source)
        load = VQGAN.from_hfailab if source == "vqgan.pt" else ConditionalTransformer.from_hfailab
        refused(lambda load=load, source=source: load(tmp_path / source), source)
    path = taming_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"][FIRST] = poisoned(content["state_dict"][FIRST], kind)
    torch.save(content, path)
    refused(lambda: VQGAN.from_taming(path, CONFIG), path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floating_point_types_load(folder, dtype):
    weights = folder["VQGAN"] / "model.safetensors"
    state = load_file(weights)
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, weights)
    assert VQGAN.load(folder["VQGAN"]).codebook.dtype == torch.float32


def test_tokenizer_with_nan_is_refused(call, pipe, tmp_path):
    weights = pipe.save(tmp_path / "pair") / "vqgan" / "model.safetensors"
    state = load_file(weights)
    save_file(state | {"decoder.conv_out.bias": torch.full_like(state["decoder.conv_out.bias"], torch.nan)}, weights)
    result = call("clipgen-sample", "--checkpoint", "pair", "--prompt", "a ring")
    assert result.code == 1 and "weights must be finite" in result.stderr and "vqgan" in result.stderr
    assert not list(tmp_path.glob("samples/*.png"))


# ----------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("ConditionalTransformer", {"n_head": 0}),
        ("ConditionalTransformer", {"n_head": "two"}),
        ("ConditionalTransformer", {"n_layer": -1}),
        ("ConditionalTransformer", {"n_layer": None}),
        ("ConditionalTransformer", {"dropout": "much"}),
        ("ConditionalTransformer", {"dropout": [0.1]}),
        ("ConditionalTransformer", {"activation": "nothing"}),
        ("ConditionalTransformer", {"activation": 5}),
        ("ConditionalTransformer", {"tie_embeddings": "yes"}),
        ("ConditionalTransformer", {"cond_drop_prob": float("nan")}),
        ("ConditionalTransformer", {"n_embd": 32.5}),
        ("VQGAN", {"patch_size": 0}),
        ("VQGAN", {"ch": 0}),
        ("VQGAN", {"ch_mult": []}),
        ("VQGAN", {"ch_mult": 4}),
        ("VQGAN", {"ch_mult": [1, "2"]}),
        ("VQGAN", {"ch_mult": [0, 0]}),
        ("VQGAN", {"fsq_levels": {"a": 1}}),
        ("VQGAN", {"quantizer_type": ["cosine"]}),
        ("VQGAN", {"quantizer_type": "none"}),
        ("VQGAN", {"codebook_size": "many"}),
        ("VQGAN", {"codebook_size": True}),
        ("VQGAN", {"ema_decay": 2}),
        ("VQGAN", {"no_such_argument": 1}),
    ],
)
def test_wrong_values_of_a_configuration_name_the_file(folder, model, arguments):
    path = change_config(folder[model], **arguments)
    refused(lambda: MODELS[model].load(path), path)


@pytest.mark.parametrize(
    "content",
    [
        '{"model": [], "arguments": {}}',
        '{"model": {"a": 1}, "arguments": {}}',
        '{"model": "VQGAN", "arguments": [1]}',
        '{"model": "VQGAN", "arguments": null}',
        '{"model": "VQGAN", "arguments": "ch"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "null",
        '"text"',
    ],
)
def test_malformed_configurations_name_the_file(folder, content):
    (folder["VQGAN"] / "config.json").write_text(content)
    refused(lambda: VQGAN.load(folder["VQGAN"]), folder["VQGAN"] / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters": ...},
        {"state_dict": ...},
        {"hyper_parameters": [1]},
        {"hyper_parameters": {1: 2}},
        {"hyper_parameters": {"ch": torch.zeros(3)}},
        {"state_dict": [1]},
        {"state_dict": {1: torch.zeros(1)}},
        {"state_dict": {"a": 5}},
        {"state_dict": {"a": [1]}},
        {"state_dict": {}},
        {"clipgen_model": ["VQGAN"]},
        {"clipgen_model": 5},
    ],
)
def test_malformed_checkpoints_name_the_file(tmp_path, tiny_vqgan, changes):
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt", **changes)
    refused(lambda: VQGAN.load(path), path)


def test_malformed_published_checkpoints_name_the_file(tmp_path):
    for state in ([FIRST], {FIRST: 1}, {FIRST: torch.zeros(3)}, {5: 6}):
        content = {"state_dict": state}
        torch.save(content, tmp_path / "last.ckpt")
        refused(lambda: VQGAN.from_taming(tmp_path / "last.ckpt", CONFIG), "last.ckpt")
        torch.save({"model": state}, tmp_path / "vqgan.pt")
        refused(lambda: VQGAN.from_hfailab(tmp_path / "vqgan.pt"), "vqgan.pt")
        refused(lambda: ConditionalTransformer.from_hfailab(tmp_path / "vqgan.pt"), "vqgan.pt")


def test_malformed_projectors_name_the_file(tmp_path):
    good = {"neighbors": "8", "temperature": "0.01"}
    for tensors, settings in (
        ({"shift": torch.zeros(4)}, good | {"neighbors": "many"}),
        ({"shift": torch.zeros(4)}, good | {"neighbors": "0"}),
        ({"shift": torch.zeros(4)}, good | {"temperature": "nan"}),
        ({"shift": torch.zeros(4)}, None),
        ({"shift": torch.zeros(4, 4)}, good),
        ({"shift": torch.full((4,), torch.nan)}, good),
        ({"memory": torch.zeros(2, 4, dtype=torch.int8)}, good),
        ({"memory": torch.zeros(2, 4), "shift": torch.zeros(5)}, good),
        ({"memory": torch.zeros(0, 4)}, good),
        ({"other": torch.zeros(4)}, good),
    ):
        save_file(tensors, tmp_path / "projector.safetensors", settings)
        refused(lambda: EmbeddingProjector.load(tmp_path / "projector.safetensors"), "projector.safetensors")


def test_init_from_gpt2_that_are_a_pickle_are_refused_with_their_name(tmp_path, tiny_transformer):
    config = tiny_transformer.gpt.transformer.config
    config.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": argparse.Namespace()}))
    refused(lambda: gpt2.load_gpt2_weights(tmp_path / "gpt2", config), tmp_path / "gpt2")
    content = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(content | {"vocab_size": 10**12}))
    refused(lambda: gpt2.load_gpt2_weights(tmp_path / "gpt2", config), tmp_path / "gpt2", "vocab_size")


def test_init_from_gpt2_must_be_finite(tmp_path, tiny_transformer):
    net = tiny_transformer.gpt.transformer
    net.h[0].mlp.c_fc.weight.data[0, 0] = torch.inf
    net.save_pretrained(tmp_path / "gpt2")
    refused(lambda: gpt2.load_gpt2_weights(tmp_path / "gpt2", net.config), tmp_path / "gpt2", "finite")


# ------------------------------------------------------------------------------------------------ wrapped checkpoints


def compiled(name: str) -> str:
    """A name as torch.compile of a part makes it."""
    head, _, rest = name.partition(".")
    return f"{head}._orig_mod.{rest}" if rest else name


WRAPPED = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled and parallel": lambda name: f"module._orig_mod.{name}",
    "a compiled part": compiled,
    "latent diffusion": lambda name: f"first_stage_model.{name}",
    "a module around it": lambda name: f"model.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
}
BESIDE = {
    "best": np.float64(0.5),
    "count": np.int64(3),
    "array": np.arange(4.0),
    "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(path=Path("data"))),
    "config": OmegaConf.create({"model": {"ch": 32, "mult": [1, 2], "none": None}}),
    "counts": defaultdict(int, {"a": 1}),
    "times": [datetime.now(timezone.utc), uuid4(), Decimal("0.5"), Fraction(1, 2), range(3), slice(2), frozenset([1])],
}


PUBLISHED = {
    "taming_vqgan/last.ckpt": ("state_dict", FIRST),
    "taming_gumbel/last.ckpt": ("state_dict", FIRST),
    "hfailab_clip_gen/vqgan.pt": ("model", FIRST),
    "hfailab_clip_gen/gpt.pt": ("model", "tok_emb.weight"),
}


def wrapped_file(source: Path, path: Path, key: str, wrap) -> Path:
    """A published checkpoint with other names, and with what trainers store beside weights."""
    state = {wrap(name): tensor for name, tensor in safe_load.read_checkpoint(source)[key].items()}
    if any(name.startswith("first_stage_model.") for name in state):
        state |= {f"cond_stage_model.{FIRST}": torch.zeros(3), "model.diffusion_model.a": torch.zeros(1)}
    torch.save({key: state} | BESIDE, path)
    return path


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("file", PUBLISHED)
def test_wrapped_names_of_published_checkpoints_are_restored(shared, tmp_path, file, wrap):
    key, first = PUBLISHED[file]
    source = shared / "parity" / file
    loaded = safe_load.read_weights(wrapped_file(source, tmp_path / "x.ckpt", key, wrap), key, first, "theirs")
    theirs = safe_load.read_checkpoint(source)[key]
    assert loaded.keys() == theirs.keys() and all(torch.equal(loaded[name], theirs[name]) for name in theirs)


def test_wrapped_published_checkpoints_load(shared, tmp_path):
    taming_folder, hfailab = shared / "parity" / "taming_vqgan", shared / "parity" / "hfailab_clip_gen"
    for source, load in (
        (taming_folder / "last.ckpt", lambda path: VQGAN.from_taming(path, taming_folder / "model.yaml")),
        (hfailab / "vqgan.pt", VQGAN.from_hfailab),
        (hfailab / "gpt.pt", ConditionalTransformer.from_hfailab),
    ):
        key, _ = PUBLISHED[f"{source.parent.name}/{source.name}"]
        path = wrapped_file(source, tmp_path / source.name, key, WRAPPED["compiled and parallel"])
        before, after = load(source).state_dict(), load(path).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_names_of_our_own_checkpoints_load(tmp_path, tiny_vqgan, tiny_transformer, wrap):
    for model in (tiny_vqgan, tiny_transformer):
        state = {wrap(name): tensor for name, tensor in model.state_dict().items()}
        again = type(model).load(checkpoint_of(model, tmp_path / "x.ckpt", state_dict=state, **BESIDE))
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("kind", ["namespace", "dictconfig", "numpy"])
def test_hyperparameters_of_other_types_are_read(tmp_path, tiny_vqgan, kind, layout):
    arguments = dict(tiny_vqgan.hparams)
    sizes = arguments["autoencoder"]
    made = {
        "namespace": lambda: argparse.Namespace(**arguments),
        "dictconfig": lambda: OmegaConf.create({"x": arguments}).x,
        "numpy": lambda: arguments | {"autoencoder": sizes | {"ch": np.int64(sizes["ch"])}, "compile": np.bool_(False)},
    }[kind]()
    content = {"clipgen_model": "VQGAN", "hyper_parameters": made, "state_dict": dict(tiny_vqgan.state_dict())}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=layout == "zip")
    again = VQGAN.load(tmp_path / "x.ckpt")
    assert dict(again.hparams) == arguments


def test_a_file_of_several_models_is_refused(tmp_path):
    state = VQGAN(**taming.convert_config(CONFIG)).autoencoder.state_dict()
    both = {f"{prefix}.{name}": tensor for prefix in ("student", "teacher") for name, tensor in state.items()}
    torch.save({"state_dict": both}, tmp_path / "last.ckpt")
    refused(
        lambda: VQGAN.from_taming(tmp_path / "last.ckpt", CONFIG), "last.ckpt", "several models (student., teacher.)"
    )


class Call:
    """Pickles as a call of a function of another module."""

    def __init__(self, function: str, *arguments: object):
        self.function, self.arguments = function, arguments

    def written(self) -> bytes:
        module, _, name = self.function.rpartition(".")
        arguments = pickle.dumps(self.arguments, protocol=2)[2:-1]
        return b"\x80\x02}(X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + arguments + b"Ru."


@pytest.mark.parametrize(
    "function",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "numpy.testing._private.utils.runstring",
        "pathlib.Path.touch",
        "types.FunctionType",
        "collections.namedtuple",
        "omegaconfx.DictConfig",
    ],
)
def test_functions_stay_refused(tmp_path, tiny_vqgan, function):
    """What stands in for configurations does not stand in for code, so that such a file is not used at all."""
    path = checkpoint_of(tiny_vqgan, tmp_path / "x.ckpt")
    with zipfile.ZipFile(path) as archive:
        content = {record.filename: archive.read(record) for record in archive.infolist()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, Call(function, "1 + 1").written() if name.endswith("data.pkl") else data)
    path.write_bytes(written.getvalue())
    refused(lambda: VQGAN.load(path), path, "not a readable checkpoint")


def test_pickle_stubs_execute_nothing(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "x.pt")
    loaded = safe_load.read_checkpoint(tmp_path / "x.pt")["args"]
    assert type(loaded) is pickle_stubs.PickleStub and loaded.state == {"a": 1}


def test_bundled_pipeline_loads_and_generates_the_same_images(tmp_path):
    pipe = TextToImage.load("shapes")
    again = TextToImage.load(pipe.save(tmp_path / "again"))
    assert pipe.fingerprint == again.fingerprint
    assert load_arguments_and_state("shapes", "VQGAN")[0]["autoencoder"]["ch"] == pipe.vqgan.autoencoder_config.ch


# ------------------------------------------------------------------------------------------------- nested and repeated


def repeated(depth: int) -> list:
    """Return a list that unfolds to 10**depth values, and takes a few bytes in a pickle."""
    value: list = ["x"] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def circle() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [repeated(9), circle()], ids=["repeated", "circle"])
def test_values_of_a_checkpoint_that_unfold_without_end_are_refused(tmp_path, tiny_vqgan, value):
    settings = dict(tiny_vqgan.hparams) | {"loss": value}
    torch.save({"clipgen_model": "VQGAN", "hyper_parameters": settings, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt is not a readable checkpoint: it must contain at most"):
        VQGAN.load(tmp_path / "a.ckpt")


def test_a_header_of_millions_of_tensors_is_refused_at_once(folder):
    weights = folder["VQGAN"] / "model.safetensors"
    weights.write_bytes((2**24).to_bytes(8, "little") + b"{}" + b" " * (2**24 - 2))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its header must have at most"):
        VQGAN.load(folder["VQGAN"])


def test_links_out_of_a_model_folder_are_refused(folder, tmp_path):
    weights = folder["VQGAN"] / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors must lie in"):
        VQGAN.load(folder["VQGAN"])


@pytest.mark.parametrize("name", ["inception", "torchvision:resnet18", "classifier"])
def test_weights_for_evaluation_that_claim_more_than_they_hold_are_refused(tmp_path, name):
    """The records of an honest archive of torch.save are stored without compression."""
    path = tmp_path / "weights.pt"
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in stored.namelist():
            bomb.writestr(record, stored.read(record))
    with pytest.raises(ValueError, match=r"weights\.pt is not a readable checkpoint: .* is compressed"):
        feature_extractor(f"{name}:{path}")


# ------------------------------------------------------------------------------------------------ calls of a pickle


def text(value: str) -> bytes:
    """The pickle of a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    """The pickle of a number."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def called(function: str, *arguments: bytes) -> bytes:
    """The pickle of a call."""
    module, _, name = function.rpartition(".")
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def doubled(times: int) -> bytes:
    """The pickle of 100 bytes that are written in hexadecimal digits again and again."""
    value = called("_codecs.encode", text("a" * 100), text("latin1"))
    for _ in range(times):
        value = called("_codecs.encode", value, text("hex"))
    return value


def copied(function: str) -> bytes:
    """The pickle of a list that a function copies 5000 times."""
    numbers = b"(" + b"".join(number(i) for i in range(20_000)) + b"l"
    return b"](" + b"(" + numbers[1:-1] + b"tq\x00" + b"".join([called(function, b"h\x00")] * 5000) + b"e"


BOMBS = {
    "bytearray": called("builtins.bytearray", number(2 * 10**9)),
    "bytearray of Python 2": called("__builtin__.bytearray", number(2 * 10**9)),
    "new bytearray": called("builtins.bytearray", number(2 * 10**9))[:-1] + b"\x81",
    "bytearray behind a type": called(
        "torch._tensor._rebuild_from_type_v2",
        b"cbuiltins\nbytearray\n",
        b"ctorch\nTensor\n",
        b"(" + number(2 * 10**9) + b"t",
        b"}",
    ),
    "hexadecimal": doubled(24),
    "tensor": called("torch.Tensor", number(10**9)),
    "storage": called("torch.storage.UntypedStorage", number(4 * 10**9)),
    "sets": copied("builtins.set"),
    "sizes": copied("torch.Size"),
}


def document(value: bytes) -> bytes:
    """The pickle of a checkpoint with a value in its hyperparameters."""
    entries = {"clipgen_model": text("VQGAN"), "state_dict": b"}", "hyper_parameters": value}
    return b"\x80\x02}(" + b"".join(text(key) + entry for key, entry in entries.items()) + b"u."


def archive_of(path: Path, content: bytes) -> Path:
    """A file of torch.save with a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


def sequence_of(path: Path, content: bytes) -> Path:
    """A file of torch.save with a pickle, as it was before archives."""
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = [0x1950A86A20F9469CFC6C, 1001, sizes]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + content + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("write", [archive_of, sequence_of])
@pytest.mark.parametrize("name", BOMBS)
def test_calls_that_take_memory_are_refused(tmp_path, little, name, write):
    path = write(tmp_path / "x.ckpt", document(BOMBS[name]))
    refused(lambda: VQGAN.load(path), path, "not a readable checkpoint", "refused" if name[0] == "b" else "")


def test_threads_that_read_checkpoints_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Both files name a class. One thread ends and forgets it while the other one is about to read it."""
    for name in ("first", "second"):
        torch.save({"number": Decimal(1)}, tmp_path / name)
    both_refused = threading.Barrier(2)
    first_reads, second_ends = threading.Event(), threading.Event()
    load, stub_for = torch.load, safe_load.stub_for
    calls = Counter()

    def slow_stub_for(name: str) -> type | None:
        both_refused.wait(10)
        return stub_for(name)

    def slow_load(path: Path, **options: object) -> object:
        calls[path.name] += 1
        if calls["first"] == 2 and path.name == "first":
            first_reads.set()
            second_ends.wait(1)
        if calls["second"] == 2 and path.name == "second":
            first_reads.wait(1)
        return load(path, **options)

    def read_second() -> None:
        safe_load.read_checkpoint(tmp_path / "second")
        second_ends.set()

    monkeypatch.setattr(safe_load, "stub_for", slow_stub_for)
    monkeypatch.setattr(torch, "load", slow_load)
    second = threading.Thread(target=read_second)
    second.start()
    assert safe_load.read_checkpoint(tmp_path / "first").keys() == {"number"}
    second.join(10)
    assert second_ends.is_set()


def test_checkpoint_is_not_mapped_on_windows(tmp_path, monkeypatch):
    """Windows does not replace a file that is mapped."""
    path = tmp_path / "x.ckpt"
    weights = torch.arange(12.0).view(3, 4)
    torch.save({"weights": weights, "transposed": weights.T}, path)
    monkeypatch.setattr(safe_load, "IS_WINDOWS", True)
    content = safe_load.read_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(content["weights"], weights) and torch.equal(content["transposed"], weights.T)
    assert content["weights"].data_ptr() == content["transposed"].data_ptr()


def test_tensors_larger_than_their_storage_are_refused(tmp_path, little):
    """torch would enlarge the storage."""
    torch.save({"a": torch.zeros(7, 11)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    # 7 * 11 numbers in rows of 11 become 127 * 127 in rows of 127
    changed = content.replace(b"K\x07K\x0b\x86", b"K\x7fK\x7f\x86").replace(b"K\x0bK\x01\x86", b"K\x7fK\x01\x86")
    assert changed != content and safe_load.read_checkpoint(tmp_path / "x.pt")["a"].shape == (7, 11)
    (tmp_path / "x.pt").write_bytes(changed)
    refused(lambda: safe_load.read_checkpoint(tmp_path / "x.pt"), "x.pt", "refused")


def test_archives_with_two_directories_are_refused(tmp_path):
    """One reader finds a directory by its offset, another one by the end of the file."""
    archive_of(tmp_path / "inner.ckpt", document(b"}"))
    inner = (tmp_path / "inner.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(inner + inner)
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.namelist()
    refused(lambda: safe_load.read_checkpoint(tmp_path / "x.ckpt"), "x.ckpt", "does not end with the directory")


@pytest.mark.parametrize("layout", [True, False])
def test_honest_values_of_checkpoints_are_read(tmp_path, layout):
    """Bytes, arrays, shared and transposed tensors, parameters, counters."""
    weights = torch.arange(12.0).view(3, 4)
    content = {
        "weights": weights,
        "transposed": weights.T,
        "row": weights[1],
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(weights),
        "bytes": b"\x00\xff" * 100,
        "array": bytearray(b"abc"),
        "milestones": Counter({3: 1}),
        "names": {"a", "b"},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "lr": np.float64(0.5),
    }
    if layout:
        content |= {"float8": torch.ones(3).to(torch.float8_e4m3fn), "unsigned": torch.ones(3, dtype=torch.uint16)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=layout)
    loaded = safe_load.read_checkpoint(tmp_path / "x.pt")
    assert all(torch.equal(loaded[name], content[name]) for name in ("weights", "transposed", "row", "parameter"))
    assert loaded["bytes"] == content["bytes"] and loaded["milestones"] == content["milestones"]


# -------------------------------------------------------------------------------- files that other libraries read


class Marker:
    """A pickle that makes a file when it is read, behind a name that checkpoints of Lightning may hold."""

    def __init__(self, marker: Path):
        self.marker = marker

    def written(self) -> bytes:
        """The pickle: from protocol 4 on, a name can lead through a module to another one."""
        function = b"clightning_fabric.plugins.io.torch_io\nos.mkdir\n"
        return b"\x80\x04}(" + text("a") + function + b"(" + text(str(self.marker)) + b"tRu."


@pytest.mark.parametrize("write", [archive_of, sequence_of])
@pytest.mark.parametrize("name", ["inception", "torchvision:resnet18", "timm:resnet10t", "classifier"])
def test_no_library_executes_code_in_weights(tmp_path, name, write):
    path = write(tmp_path / "weights.pth", Marker(tmp_path / "marker").written())
    with pytest.raises(ValueError, match="weights"):
        feature_extractor(f"{name}:{path}")
    assert not (tmp_path / "marker").exists()


def test_libraries_read_their_own_downloads_as_weights_only(tmp_path):
    sequence_of(tmp_path / "weights.pth", Marker(tmp_path / "marker").written())
    with safe_load.only_weights(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "weights.pth", weights_only=False)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.safetensors"])
def test_weights_of_an_open_clip_model_are_checked_before_it_reads_them(tmp_path, little, name):
    path = tmp_path / name
    if name == "x.pt":
        archive_of(path, document(BOMBS["bytearray"]))
    elif name == "x.npz":
        np.savez_compressed(path, a=np.zeros(10**6))
    else:
        path.write_bytes((2**30).to_bytes(8, "little"))
    refused(lambda: load_open_clip("ViT-B-32", str(path), False), path)


@pytest.mark.parametrize("content", [BOMBS["bytearray"], called("os.mkdir", text("marker"))])
def test_weights_of_the_perceptual_loss_are_checked(tmp_path, little, content):
    path = archive_of(tmp_path / "vgg.pth", document(content))
    refused(lambda: load_lpips(str(path)), path, "not a readable checkpoint", "refused")


def test_another_torchmetrics_is_not_called_missing_weights(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "vgg.pth")
    monkeypatch.delattr("torchmetrics.functional.image.lpips._LPIPS")
    with pytest.raises(
        ValueError, match=r"torchmetrics .* does not work as clipgen expects .*pip install 'torchmetrics"
    ):
        load_lpips(str(tmp_path / "vgg.pth"))


def test_cached_weights_of_the_perceptual_loss_are_checked(tmp_path, monkeypatch, little):
    (tmp_path / "checkpoints").mkdir()
    path = archive_of(tmp_path / "checkpoints" / "vgg16-397923af.pth", document(BOMBS["bytearray"]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    refused(lambda: load_lpips(), path, "not a readable checkpoint", "refused")


def test_weights_of_the_first_versions_of_torch_are_read(tmp_path):
    """torchvision's VGG-16 is of 2017: tensors are made without a size, and then set to their storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06NtQ"
    place, size, stride = b"K\x00", b"K\x02K\x03\x86", b"K\x03K\x01\x86"
    values = [
        called("torch._utils._rebuild_tensor", storage, place, size, stride),
        called("torch._utils._rebuild_tensor", storage, place, called("torch.Size", size), stride),
        b"ctorch\nFloatTensor\n)R(" + storage + place + size + stride + b"tb",
    ]
    for value in values:
        path = sequence_of(tmp_path / "x.pth", b"\x80\x02}" + text("a") + value + b"s.")
        numbers = (6).to_bytes(8, "little") + np.arange(6, dtype=np.float32).tobytes()
        path.write_bytes(path.read_bytes().removesuffix(pickle.dumps([], 2)) + pickle.dumps(["0"], 2) + numbers)
        assert safe_load.read_checkpoint(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_only_the_sizes_in_a_gpt2s_configuration_count(tmp_path, little, tiny_transformer):
    folder = tmp_path / "gpt2"
    sizes = {name: getattr(tiny_transformer.gpt_config, name) for name in gpt2.NETWORK_SIZES}
    GPT2Model(GPT2Config(vocab_size=16, n_positions=16, **sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"n_inner": 10**9, "add_cross_attention": True, "_attn_implementation": "evil/kernels"}
    (folder / "config.json").write_text(json.dumps(config))
    assert gpt2.load_gpt2_weights(folder, GPT2Config(**sizes))["wte.weight"].shape == (16, sizes["n_embd"])

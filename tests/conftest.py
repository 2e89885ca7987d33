"""Fixtures: tiny models, images, and functions that train modules and call commands."""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import webdataset as wds
from commands import TRANSFORMER, Call
from feature_spaces import shapes_folder
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import ShapesDataset
from clipgen.hardware.processor import has_bf16_units, instruction_set
from clipgen.models import cpu_kernels
from clipgen.pipeline import TextToImage
from clipgen.training.cluster import leave_group
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

SHARED = Path(os.environ.get("CLIPGEN_SHARED", Path(__file__).parents[2] / "shared"))
# Commands refuse bfloat16 on processors that do not multiply fast in it.
needs_bf16 = pytest.mark.skipif(not has_bf16_units("cpu"), reason="needs a processor that multiplies in bfloat16")
# Each instruction set has its own cache of compiled kernels. With a shared cache, the tests of torch.compile fail with
# NaN when they imitate AVX2 after a run with AVX-512.
USER = os.getuid() if hasattr(os, "getuid") else "user"
COMPILED = Path(tempfile.gettempdir()) / f"torchinductor_{USER}_{instruction_set()}"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(COMPILED)
# Test modules are imported by the processes that Lightning starts, too.
atexit.register(leave_group)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference data, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("there is no shared folder next to the project; set CLIPGEN_SHARED to run the parity tests")
    return SHARED


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Return eight images of shapes, (8, 3, 32, 32) in [-1, 1]."""
    return ShapesDataset(8, seed=7).render(range(8))


@pytest.fixture
def tiny_vqgan(images: Tensor) -> VQGAN:
    """Return an untrained VQ-GAN with f = 8, whose codes are latents of ``images``."""
    vqgan = make_vqgan(**VQGAN_SIZES)
    # The first batch in training mode initializes the codebook.
    vqgan.autoencoder.quantize(vqgan.encode_latents(images))
    return vqgan.eval()


@pytest.fixture
def tiny_transformer() -> ConditionalTransformer:
    """Return an untrained transformer with weights so large that its logits differ clearly."""
    transformer = make_transformer(**TRANSFORMER_SIZES)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.eval()


@pytest.fixture(scope="session")
def shapes_clip() -> FrozenCLIP:
    return FrozenCLIP("shapes")


@pytest.fixture
def pipe(tiny_vqgan: VQGAN, tiny_transformer: ConditionalTransformer, shapes_clip: FrozenCLIP) -> TextToImage:
    return TextToImage(tiny_vqgan, tiny_transformer, shapes_clip)


@pytest.fixture(scope="session")
def two_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of 24 and 30 PNGs of shapes, with their captions in the metadata."""
    base = tmp_path_factory.mktemp("images")
    return shapes_folder(base / "a", 24, 1), shapes_folder(base / "b", 30, 2)


@pytest.fixture
def reference_cache(tmp_path_factory, monkeypatch) -> None:
    """Keep the features of references in a temporary folder."""
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """The weights of a randomly initialized Inception, saved in the published layout."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # The constructor downloads and loads the published weights; here it does neither.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, *args, **kwargs: None)
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            # With the default initialization the features of so deep a network vanish.
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Return a function that calls a command, by name and arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: Call(monkeypatch, capsys, *arguments)


@pytest.fixture
def fit():
    """Return a function that trains a module on shapes for some steps and returns the trainer."""

    def run(module: pl.LightningModule, steps: int, *callbacks: pl.Callback, batch: int = 8, **settings) -> pl.Trainer:
        size = steps * batch * module.optimizer_config.grad_accum_steps
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **(QUIET | settings))
        trainer.fit(module, DataLoader(ShapesDataset(size, seed=3), batch_size=batch))
        return trainer

    return run


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of tensors that differ from a copy of the state dict."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture
def class_run(call, tiny_vqgan, tmp_path) -> Path:
    """A run folder of the class-conditional transformer, trained with the commands."""
    tiny_vqgan.save(tmp_path / "vqgan")
    arguments = ["data.train_size=64", "data.val_size=16", "device=cpu", "output=cache", "data.labels=true"]
    result = call("clipgen-encode", "vqgan=vqgan", *arguments)
    assert result.code == 0, result.stderr
    conditioning = ["data=cached", "data.root=cache", "data.conditioning=class"]
    result = call("clipgen-train", *TRANSFORMER, *conditioning, "output=run")
    assert result.code == 0, result.stderr
    return tmp_path / "run"


@pytest.fixture(scope="session")
def labeled_shards(tmp_path_factory) -> Path:
    """Return a folder of shards with two classes of noise, red and blue, and their names."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    for name, number in (("train-000000", 32), ("train-000001", 8), ("val-000000", 8)):
        with wds.TarWriter(str(folder / f"{name}.tar")) as writer:
            for i in range(number):
                pixels = torch.randint(100, (32, 32, 3), generator=generator).to(torch.uint8)
                pixels[:, :, 2 * (i % 2)] += 100
                writer.write({"__key__": f"{i:03d}", "png": Image.fromarray(pixels.numpy()), "cls": i % 2})
    (folder / "classes.json").write_text('["red", "blue"]')
    return folder


@pytest.fixture(scope="session")
def small_classifier(labeled_shards, tmp_path_factory) -> Path:
    """Return the file of a small classifier, trained for a moment; its last training shard is held out."""
    import train_classifier

    output = tmp_path_factory.mktemp("classifier")
    sizes = train_classifier.shard_sizes(labeled_shards)
    train_classifier.train(train_classifier.Settings(4, 8, 1, 32, 0, (8, 8, 8), sizes), labeled_shards, 2, output)
    return output / "classifier.pt"


@pytest.fixture
def kernel_cache(monkeypatch, tmp_path) -> Path:
    """Let measured kernels be kept in a new folder."""
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    cpu_kernels.measured_kernel.cache_clear()
    yield tmp_path / "cache"
    cpu_kernels.measured_kernel.cache_clear()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder of sixty images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (40, 36), (i * 4, 99, 0)).save(folder / f"{i:02d}.png")
    return folder

"""Generators of others: TorchScript, functions, BigGAN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipgen.baselines.generators import ExternalGenerator, load_generator

NAMES = ["red", "green", "blue"]


class GrayImages(nn.Module):
    """An image of one gray level, by its class; scripted in the tests."""

    def forward(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        grey = class_indices.to(noise.dtype) / 4 - 1 + 0.0 * noise.sum(dim=1)
        return grey[:, None, None, None].expand(-1, 3, 8, 8)


def test_torchscript_file_is_loaded_and_checked(tmp_path):
    path = str(tmp_path / "plain.pt")
    torch.jit.save(torch.jit.script(GrayImages()), path)
    generator = load_generator(path, noise_dim=2, class_names=NAMES)
    images = generator(torch.randn(3, 2), torch.tensor([0, 1, 2]))
    assert images.shape == (3, 3, 8, 8) and images[:, 0, 0, 0].tolist() == [-1, -0.75, -0.5]
    assert (generator.noise_dim, generator.class_names, generator.device.type) == (2, NAMES, "cpu")
    with pytest.raises(ValueError, match=r"noise_dim must be given for .*plain.pt, which has no such attribute"):
        load_generator(path)
    with pytest.raises(ValueError, match=r"plain.pt failed on noise \(3, 2\) and class_indices \(4,\): "):
        generator(torch.randn(3, 2), torch.zeros(4, dtype=torch.int64))
    Path(path).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"plain.pt is not a TorchScript file; name a state dict biggan:FILE or sagan"):
        load_generator(path, 2, NAMES)
    with pytest.raises(FileNotFoundError, match=r"no TorchScript file .*other.pt"):
        load_generator(str(tmp_path / "other.pt"), 2, NAMES)


def test_functions_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_gan.py").write_text(
        "import torch\ndef generate(noise, class_indices):\n    return torch.zeros(len(noise), 3, 4, 4)\n"
        "generate.noise_dim, generate.class_names = 7, ['a', 'b']\nnumber = 3\n"
    )
    generator = load_generator("my_gan:generate")
    assert (generator.noise_dim, generator.class_names) == (7, ["a", "b"])
    assert load_generator("my_gan:generate", class_names=["c"]).class_names == ["c"]  # arguments take precedence
    for source, message in (
        ("my_gan:number", "must be callable, got a int"),
        ("my_gan:none", "my_gan:none cannot be imported"),
        ("no_such_gan:generate", "no_such_gan:generate cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            load_generator(source)
    with pytest.raises(FileNotFoundError, match=r"generator must be a run folder, .* got my_gan, which does not exist"):
        load_generator("my_gan")
    with pytest.raises(ValueError, match="sampling parameters apply to a run folder only"):
        load_generator("my_gan:generate", sampling={"top_k": 3})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4), r"must return images \(2, 3, H, W\), got \(2, 3, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"must return images \(2, 3, H, W\), got \(2, 1, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"must return images \(2, 3, H, W\), got \(1, 3, 4, 4\)"),
        ([1, 2], r"must return images \(2, 3, H, W\), got list"),
        (torch.full((2, 3, 4, 4), math.nan), r"must return images in \[-1, 1\], got NaN or infinite pixels"),
        (torch.full((2, 3, 4, 4), 255.0), r"must return images in \[-1, 1\], got pixels from 255 to 255"),
    ],
)
def test_outputs_that_are_not_images_are_refused(images, message):
    with pytest.raises(ValueError, match="mine " + message):
        ExternalGenerator(lambda noise, classes: images, "mine", 4, NAMES)(
            torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
        )


def test_rounding_outside_the_range_is_clamped():
    images = ExternalGenerator(lambda noise, classes: torch.full((1, 3, 2, 2), 1.01), "mine", 4, NAMES)(
        torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    )
    assert torch.equal(images, torch.ones(1, 3, 2, 2))

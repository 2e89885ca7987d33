"""StudioGAN's SAGAN by file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gan_states import biggan_state, sagan_state

from clipgen.baselines import load_generator
from clipgen.baselines.gan_layers import truncated_normal


@pytest.mark.parametrize("folder", ["sagan", "sagan_studiogan_2022"])
def test_images_equal_those_of_studiogan(shared, folder):
    expected = np.load(shared / "parity" / folder / "expected.npz")
    generator = load_generator(f"sagan:{shared / 'parity' / folder / 'weights.pth'}")
    images = generator(torch.from_numpy(expected["z"]), torch.from_numpy(expected["labels"]))
    error = (images - torch.from_numpy(expected["images"])).abs()
    assert error.max() < 1e-3 and error.mean() < 1e-5


@pytest.mark.parametrize("year", [2021, 2022])
def test_every_tensor_is_needed_and_used(tmp_path, year):
    state = sagan_state(year)
    path = tmp_path / "model.ckpt"  # the prefix decides, not the ending
    torch.save({"state_dict": state, "optimizer": {}}, path)
    generator = load_generator(f"sagan:{path}")
    noise, classes = torch.randn(3, 4), torch.tensor([0, 4, 0])
    images = generator(noise, classes)
    assert generator.noise_dim == 4 and images.shape == (3, 3, 16, 16) and images.std() > 0.1
    for name in state:
        if name.endswith("num_batches_tracked"):
            continue
        torch.save({"state_dict": {key: value for key, value in state.items() if key != name}}, path)
        with pytest.raises(ValueError, match=r"model\.ckpt"):
            load_generator(f"sagan:{path}")
    torch.save({"state_dict": {**state, "blocks.0.0.extra": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"1 of its tensors have no place, such as 'blocks.0.extra'"):
        load_generator(f"sagan:{path}")


def test_embeddings_of_2021_are_the_linear_maps_of_2022(tmp_path):
    """The two layouts hold transposed matrices, whose u and v change places."""
    old = sagan_state(2021)
    new = {}
    swap = {"weight_orig": "weight_orig", "weight_u": "weight_v", "weight_v": "weight_u"}
    for name, tensor in old.items():
        stem, _, leaf = name.rpartition(".")
        if ".embed" in name:
            stem = stem.replace("embed0", "gain").replace("embed1", "bias")
            new[f"{stem}.{swap[leaf]}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        else:
            new[name] = tensor
    noise, classes = torch.randn(2, 4), torch.tensor([1, 3])
    images = []
    for state in (old, new):
        torch.save({"state_dict": state}, tmp_path / "model.pth")
        images.append(load_generator(f"sagan:{tmp_path / 'model.pth'}")(noise, classes))
    torch.testing.assert_close(images[0], images[1])


def test_prefix_of_data_parallel_is_removed(tmp_path):
    state = sagan_state()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "bare.pth")
    noise, classes = torch.randn(2, 4), torch.tensor([1, 3])
    wrapped = load_generator(f"sagan:{tmp_path / 'wrapped.pth'}")(noise, classes)
    assert torch.equal(wrapped, load_generator(f"sagan:{tmp_path / 'bare.pth'}")(noise, classes))


def test_truncation_cuts_the_noise(tmp_path):
    torch.save(sagan_state(), tmp_path / "model.pth")
    source = f"sagan:{tmp_path / 'model.pth'}"
    noise, classes = torch.randn(2, 4), torch.tensor([1, 3])
    images = load_generator(source, truncation=0.5)(noise, classes)
    assert torch.equal(images, load_generator(source)(truncated_normal(noise, 0.5), classes))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (biggan_state, r"must be a SAGAN, got a BigGAN: name it biggan:"),
        (lambda: {**sagan_state(), "shared.weight": torch.ones(5, 3)}, "got its BigGAN, which is not supported"),
        (lambda: {"state": {}, "param_groups": []}, "must contain a generator, got an optimizer's state"),
        (lambda: {"linear1.weight_orig": torch.ones(1, 3)}, "must contain a generator, got a discriminator"),
        (
            lambda: {**sagan_state(), "linear0.weight_orig": torch.tensor(1.0)},
            "must contain a matrix or kernel at linear0",
        ),
        (lambda: {**sagan_state(), "blocks.x": torch.ones(1)}, "1 of its tensors have no place, such as 'blocks.x'"),
        (
            lambda: {**sagan_state(), "linear0.weight": torch.ones(1)},
            "must contain linear0.weight or linear0.weight_orig",
        ),
        (lambda: {"mapping.fc0.weight": torch.ones(1, 3)}, "must be StudioGAN's SAGAN, got another model"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, state, message):
    torch.save({"state_dict": state()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_generator(f"sagan:{tmp_path / 'model.pth'}")


def test_inputs_of_another_size_are_refused(tmp_path):
    torch.save(sagan_state(), tmp_path / "model.pth")
    generator = load_generator(f"sagan:{tmp_path / 'model.pth'}")
    with pytest.raises(ValueError, match=r"noise must be \(B, 4\)"):
        generator(torch.randn(2, 5), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"class_indices must be in \[0, 5\), got \[1, 5\]"):
        generator(torch.randn(2, 4), torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"class_names must name the 5 classes .*, got 1"):
        load_generator(f"sagan:{tmp_path / 'model.pth'}", class_names=["one"])

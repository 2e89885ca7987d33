"""BigGAN and BigGAN-deep by file, and truncation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gan_states import biggan_state, deep_state, sagan_state
from torch import Tensor

from clipgen.baselines import load_generator
from clipgen.baselines.biggan import interpolate_rows, load_biggan
from clipgen.baselines.gan_layers import truncated_normal


def assert_equal(images: Tensor, expected: np.ndarray) -> None:
    error = (images - torch.from_numpy(expected)).abs()
    assert error.max() < 1e-3 and error.mean() < 1e-5


@pytest.mark.parametrize("folder", ["biggan_deep_huggingface", "biggan_pytorch"])
@pytest.mark.parametrize("name", ["", "weights.pth"])
def test_images_equal_those_of_the_published_code(shared, folder, name):
    expected = np.load(shared / "parity" / folder / "expected.npz")
    generator = load_generator(f"biggan:{shared / 'parity' / folder / name}")
    images = generator(torch.from_numpy(expected["z"]), torch.from_numpy(expected["labels"]))
    assert_equal(images, expected["images"])


@torch.no_grad()
def test_truncated_images_equal_those_of_the_published_code(shared):
    folder = shared / "parity/biggan_deep_huggingface"
    expected = np.load(folder / "expected.npz")
    noise, classes = torch.from_numpy(expected["z_truncated"]), torch.from_numpy(expected["labels_truncated"])
    assert_equal(load_biggan(folder)(noise, classes, 0.4), expected["images_truncated"])


@pytest.mark.parametrize(("make", "side", "noise_dim"), [(deep_state, 8, 4), (biggan_state, 16, 6)])
def test_every_tensor_is_needed_and_used(tmp_path, make, side, noise_dim):
    state, path = make(), tmp_path / "weights.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    generator = load_generator(f"biggan:{tmp_path}")
    images = generator(torch.randn(3, noise_dim), torch.tensor([0, 4, 0]))
    assert generator.noise_dim == noise_dim and images.shape == (3, 3, side, side) and images.std() > 0.1
    for name in state:
        torch.save({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(ValueError, match=r"weights\.bin"):
            load_generator(f"biggan:{path}")
    torch.save({**state, "extra.weight_x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"1 of its tensors have no place, such as 'extra.weight_x'"):
        load_generator(f"biggan:{path}")


def test_config_says_which_blocks_double_the_resolution(tmp_path):
    torch.save(deep_state(), tmp_path / "pytorch_model.bin")
    config = {"channel_width": 8, "layers": [[True, 2, 1], [True, 1, 1]], "eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = load_generator(f"biggan:{tmp_path}")
    assert generator(torch.randn(1, 4), torch.tensor([2])).shape == (1, 3, 16, 16)
    assert generator.model.norm.eps == 1e-3
    (tmp_path / "config.json").write_text(json.dumps({**config, "channel_width": 16}))
    with pytest.raises(ValueError, match=r"config.json must describe pytorch_model.bin, got layers of other sizes"):
        load_generator(f"biggan:{tmp_path}")


def test_statistics_are_interpolated_between_their_truncations():
    table = torch.arange(51.0)[:, None]
    for truncation in (0.02, 0.14, 0.28, 0.4, 0.56, 0.58, 0.94, 1.0):  # rows that rounding misses
        assert interpolate_rows(table, truncation).item() == round(truncation * 50)
    assert interpolate_rows(table, 0.425).item() == pytest.approx(21.25)


def test_truncated_noise_is_a_normal_cut_at_two_standard_deviations():
    noise = torch.randn(20000)
    truncated = truncated_normal(noise, 0.4)
    assert truncated.abs().max() <= 0.8 and truncated.dtype == noise.dtype
    assert truncated.std().item() == pytest.approx(0.4 * 0.8796, rel=0.02)  # of the normal cut at 2
    assert torch.equal(truncated[:3], truncated_normal(noise[:3], 0.4))
    assert torch.equal(truncated.argsort(), noise.argsort())
    assert truncated_normal(torch.tensor([-40.0, 40.0]), 1.0).tolist() == pytest.approx([-2, 2])


def test_truncation_reaches_noise_and_statistics(tmp_path):
    torch.save(deep_state(), tmp_path / "pytorch_model.bin")
    noise, classes = torch.randn(2, 4), torch.tensor([1, 2])
    generator = load_generator(f"biggan:{tmp_path}", truncation=0.4)
    with torch.no_grad():
        expected = load_biggan(tmp_path)(truncated_normal(noise, 0.4), classes, 0.4)
    assert torch.equal(generator(noise, classes), expected)
    torch.testing.assert_close(generator(noise[1:], classes[1:]), expected[1:])
    for truncation in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"truncation must be in \(0, 1\]"):
            load_generator(f"biggan:{tmp_path}", truncation=truncation)
    with pytest.raises(ValueError, match=r"truncation applies to biggan: and sagan: only"):
        load_generator("my:generate", truncation=0.4)


def test_files_converted_from_tf_hub_have_no_record_of_singular_values(tmp_path):
    state = {name: tensor for name, tensor in biggan_state().items() if not name.endswith(".sv0")}
    torch.save(state, tmp_path / "biggan-128.pth")
    assert load_generator(f"biggan:{tmp_path}").model.norm.eps == 1e-4


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (sagan_state, r"must be a BigGAN, got StudioGAN's SAGAN: name it sagan:"),
        (
            lambda: {**sagan_state(), "shared.weight": torch.ones(5, 3)},
            "got StudioGAN's BigGAN, which is not",
        ),
        (lambda: {"state": {}, "param_groups": []}, "got an optimizer's state: take the generator's file next to it"),
        (lambda: {"itr": 3, "epoch": 1, "config": {}}, "got the counters of a training run"),
        (lambda: {"embed.weight": torch.ones(5, 3)}, "must contain a generator, got a discriminator"),
        (lambda: {"a": torch.ones(5, 3)}, "must be a BigGAN, got another network"),
        (lambda: {**biggan_state(), "blocks.0.0.bn1.bn.running_mean": torch.ones(1)}, "--cross_replica or --mybn"),
        (lambda: {**deep_state(), "classes.weight": torch.ones(4, 5)}, "has no place in it"),
        (lambda: {**biggan_state(), "shared.weight": torch.tensor(1.0)}, "the sizes of its BigGAN cannot be read"),
        (lambda: {**biggan_state(), "linear.weight": torch.tensor(1.0)}, "must contain a matrix or kernel at linear"),
        (lambda: {**deep_state(), "generator.layers.x.a": torch.ones(1)}, "contains another network"),
        (lambda: {**deep_state(), "generator.layers.00.bn_0.offset": torch.ones(1)}, "contains another network"),
        (lambda: {**deep_state(), "embeddings.weight": torch.full((4, 5), torch.nan)}, "must be finite"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, state, message):
    torch.save(state(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_generator(f"biggan:{tmp_path / 'model.pth'}")


def test_names_that_were_downloaded_ask_for_a_file():
    with pytest.raises(ValueError, match=r"biggan-deep-256 is not downloaded: name its file, biggan:FILE_OR_FOLDER"):
        load_generator("biggan-deep-256")


@pytest.mark.parametrize("kind", ["biggan", "sagan"])
def test_prefix_without_a_file_is_refused(kind):
    with pytest.raises(ValueError, match=rf"generator must name a file, {kind}:FILE, got '{kind}:'"):
        load_generator(f"{kind}:")


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must contain pytorch_model.bin or G_ema.pth, got 0 other files"):
        load_generator(f"biggan:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_generator(f"biggan:{tmp_path / 'missing.pth'}")

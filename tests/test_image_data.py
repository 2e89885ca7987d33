"""Image data: decoding, transforms, folders, tar shards, and the loaders made of them."""

from __future__ import annotations

import io
import logging
import mmap
import pickle
import tarfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, SHARED
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipgen.data import folder as folder_module
from clipgen.data import folder_listing, packed_strings, shard_order
from clipgen.data import webdataset as shards_module
from clipgen.data.datamodule import ImageDataModule, training_images
from clipgen.data.decoding import UnusableImageError, check_header, decode_image
from clipgen.data.folder import ImageFolder, folder_data, split_files
from clipgen.data.folder_listing import check_holds_images, find_images
from clipgen.data.packed_strings import PackedStrings
from clipgen.data.parallel import MAX_PENDING, NUM_THREADS, parallel_map
from clipgen.data.tar_reader import Member
from clipgen.data.transforms import train_transform, val_transform
from clipgen.data.urls import expand_urls
from clipgen.data.webdataset import ImageShards, shard_data

ROOT = Path(__file__).parents[1]
BAD = SHARED / "data" / "bad_images"
needs_bad = pytest.mark.skipif(not BAD.exists(), reason=f"{BAD} is absent; set CLIPGEN_SHARED")
CIFAR10 = SHARED / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR10.exists(), reason=f"{CIFAR10} is absent; set CLIPGEN_SHARED")

USABLE = [
    "UPPER.JPEG",
    "alpha.png",
    "animated.gif",
    "café 画像 (1).jpg",
    "cmyk.jpg",
    "exif_rotated.jpg",
    "good_0.jpg",
    "good_1.jpg",
    "good_2.jpg",
    "good_3.jpg",
    "gray16.png",
    "grayscale.jpg",
    "jpeg_named.png",
    "nested/deeper/inner.jpg",
    "one_pixel.png",
    "palette.png",
    "photo.webp",
    "strip.jpg",
]
UNUSABLE = {
    "truncated.jpg": "truncated",
    "empty.jpg": "empty",
    "text.jpg": "not an image",
    "bomb.png": "too large",
}
SUMMARY = "18 images, 4 skipped: 1 truncated, 1 empty, 1 not an image, 1 too large"


def random_image(width: int = 20, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


GOOD = encoded(random_image(200, 160))
TRUNCATED = GOOD[: len(GOOD) // 2]


def make_folder(root: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        data = encoded(Image.new("RGB", (24, 18), (i * 10, 0, 0)), "PNG")
        (root / f"{i:03d}.png").write_bytes(TRUNCATED if i in bad else data)
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered_tar(path: Path, values: range) -> Path:
    """Make a shard whose images are recognized by their red value."""
    files = {f"{v:03d}.png": encoded(Image.new("RGB", (8, 8), (v, 0, 0)), "PNG") for v in values}
    return make_tar(path, files)


def red(sample: dict[str, torch.Tensor]) -> int:
    return round((float(sample["images"][0].mean()) + 1) * 127.5)


# ------------------------------------------------------------------------------------------------------------- decoding


def test_orientation_is_applied_despite_other_broken_tags() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0131] = 6, "description", "software"
    data = bytearray(encoded(random_image(20, 16), exif=exif))
    assert decode_image(bytes(data)).size == (16, 20)
    start = data.index(b"Exif")
    sizes = set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[start + 30 + rng.integers(30)] = rng.integers(256)
        sizes.add(decode_image(bytes(broken)).size)
    assert sizes <= {(16, 20), (20, 16)}


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_lossless_formats_keep_their_pixels(format: str, options: dict[str, object]) -> None:
    image = random_image()
    assert np.array_equal(decode_image(encoded(image, format, **options)), image)


@pytest.mark.parametrize("dtype", ["<u2", "int32", "float32"])
def test_high_depth_gray_is_scaled_not_clipped(dtype: str) -> None:
    top = 1.0 if dtype == "float32" else 65535
    ramp = (np.linspace(0, 1, 256) * top).reshape(16, 16).astype(dtype)
    gray = np.asarray(decode_image(encoded(Image.fromarray(ramp), "TIFF")))[..., 0].ravel()
    assert np.abs(gray.astype(int) - np.arange(256)).max() <= 1


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for format, source in (("PNG", image), ("PNG", image.convert("LA")), ("GIF", image)):
        decoded = decode_image(encoded(source, format))
        assert decoded.mode == "RGB" and decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_keeps_its_color() -> None:
    color = decode_image(encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"))).getpixel((8, 8))
    assert np.abs(np.subtract(color, (200, 40, 90))).max() < 6


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not an image"),
        (TRUNCATED, "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_unusable_content_is_refused_with_its_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(path)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError, match=r"unreadable.*gone.jpg"):
        decode_image(tmp_path / "gone.jpg")


def test_size_is_checked_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    check_header(TRUNCATED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16 // 2 - 1)  # Pillow refuses more than twice this
    with pytest.raises(UnusableImageError, match="320 pixels") as caught:
        check_header(encoded(random_image(20, 16), "PNG"))
    assert caught.value.reason == "too large"


@needs_bad
@pytest.mark.parametrize("name", USABLE)
def test_usable_photos_decode_and_transform(name: str) -> None:
    image = decode_image(BAD / name)
    assert image.mode == "RGB"
    for transform in (train_transform(32), val_transform(32)):
        images = transform(image)
        assert images.shape == (3, 32, 32) and images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1


@needs_bad
@pytest.mark.parametrize(("name", "reason"), UNUSABLE.items())
def test_unusable_photos_are_refused_with_their_reason(name: str, reason: str) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(BAD / name)
    assert caught.value.reason == reason


@needs_bad
def test_decoded_photos_have_the_right_size_and_color() -> None:
    assert decode_image(BAD / "exif_rotated.jpg").size == (160, 200)
    assert decode_image(BAD / "animated.gif").size == (64, 64)
    assert decode_image(BAD / "one_pixel.png").size == (1, 1)
    gray = np.asarray(decode_image(BAD / "gray16.png"))
    assert 20 < gray.mean() < 235 and (gray == 255).mean() < 0.2  # Pillow's own conversion is white everywhere
    alpha = Image.open(BAD / "alpha.png").getchannel("A")
    clear = np.asarray(alpha) == 0
    assert clear.any() and (np.asarray(decode_image(BAD / "alpha.png"))[clear] == 255).all()
    with pytest.raises(UnusableImageError, match="900000000"):
        check_header(BAD / "bomb.png")


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (60, 60), (31, 30), (30, 37)])
def test_val_transform_equals_resize_then_center_crop(size: tuple[int, int]) -> None:
    image = random_image(*size)
    resized = image.resize((size[0] * 30 // min(size), size[1] * 30 // min(size)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 29) // 2, (resized.height - 29) // 2
    expected = np.asarray(resized.crop((left, top, left + 30, top + 30)), dtype=int)
    actual = ((val_transform(30)(image) + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).max() <= 1


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = random_image(47, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    windows = [pixels[:, :, i : i + 32] for i in range(16)]
    places = set()
    for _ in range(200):
        images = train_transform(32, flip=False)(image)
        places |= {i for i, window in enumerate(windows) if torch.allclose(images, window)}
        assert any(torch.allclose(images, window) for window in windows)
    assert places == set(range(16))


def test_train_transform_uses_the_global_generator() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    transform = train_transform(32)
    torch.manual_seed(0)
    first = [transform(ramp) for _ in range(60)]
    torch.manual_seed(0)
    assert all(torch.equal(a, transform(ramp)) for a in first)
    starts = [float(images[0, 0].min()) for images in first]
    assert min(starts) < -0.8 and max(starts) > 0.6  # crops reach both ends
    flipped = sum(bool(images[0, 0, 0] > images[0, 0, -1]) for images in first)
    assert 15 < flipped < 45
    assert not any(t[0, 0, 0] > t[0, 0, -1] for t in (train_transform(32, flip=False)(ramp) for _ in range(20)))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (2, 3)])
def test_extreme_aspect_ratios_are_cropped_before_enlarging(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        made.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for transform in (train_transform(64), val_transform(64)):
        assert transform(Image.new("RGB", size, "white")).unique().tolist() == [1.0]
    assert set(made) == {(64, 64)}


@pytest.mark.parametrize("make", [train_transform, val_transform])
def test_image_size_is_checked(make) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        make(0)


# -------------------------------------------------------------------------------------------------------------- folders


@needs_bad
def test_folder_of_bad_images_uses_the_usable_ones(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dataset = ImageFolder(BAD, 32, train=True)
    assert list(dataset.files) == USABLE
    assert [sample["images"].shape for sample in dataset] == [(3, 32, 32)] * len(USABLE)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == len(UNUSABLE)
    for name, reason in UNUSABLE.items():
        assert sum(f"{name}: {reason}" in warning for warning in warnings) == 1
    others = f"{BAD}: files of other types are not used: 3 .tar, 1 .md, 1 .txt"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [others, f"{BAD}: {SUMMARY}"]


@needs_bad
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_broken_after_their_header_are_replaced_and_counted(
    num_workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(folder_module, "_MAX_DECODED", 0)
    handler = logging.FileHandler(tmp_path / "log")  # a file also receives the messages of worker processes
    logging.getLogger("clipgen").addHandler(handler)
    try:
        dataset = ImageFolder(BAD, 16, train=True)
        assert "truncated.jpg" in dataset.files and str(dataset.skip_counter).startswith("19 images, 3 skipped")
        loader = DataLoader(dataset, 4, shuffle=True, num_workers=num_workers)
        for _ in range(2):
            assert sum(len(batch["images"]) for batch in loader) == 19
    finally:
        logging.getLogger("clipgen").removeHandler(handler)
    assert str(dataset.skip_counter) == SUMMARY
    assert (tmp_path / "log").read_text().count("truncated.jpg") == 1


def test_broken_image_is_replaced_by_the_next_usable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_MAX_DECODED", 0)
    dataset = ImageFolder(make_folder(tmp_path, 4, bad=(1, 3)), 8, train=False)
    assert [red(sample) for sample in dataset] == [0, 20, 20, 0]
    with pytest.raises(IndexError):
        dataset[4]


def test_folder_without_any_decodable_image_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_MAX_DECODED", 0)
    dataset = ImageFolder(make_folder(tmp_path, 3, bad=(0, 1, 2)), 8, train=True)
    with pytest.raises(ValueError, match="no usable image left: 0 images, 3 skipped: 3 truncated"):
        dataset[0]


def test_folders_without_images_are_refused_and_links_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must contain \.jpg.* got 1 files of other types"):
        check_holds_images(tmp_path)
    make_folder(tmp_path / "elsewhere", 1)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    check_holds_images(tmp_path / "a")


def test_find_images_skips_hidden_files_and_follows_links_once(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/.hidden.jpg", ".secret/3.jpg", "a.Png", "notes.txt", "c/4.tiff", "jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c" / "circle").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(tmp_path) == ["a.Png", "b/2.JPG", "c/4.tiff"]


def test_files_are_listed_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """A folder is never listed as a whole, but the order of a run must be that of all paths."""
    names = ["a/2.png", "a/10.png", "a-b/1.png", "a.png", "a.d/x.png", "a/b/c.png", "a/b.png", "b/ü.png", "B/1.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_images(tmp_path) == sorted(names)


def test_headers_are_checked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [*ImageFolder(make_folder(tmp_path, 9, bad=(0, 3, 8)), 8, train=True).files]
    monkeypatch.setattr(folder_module, "_FILES_PER_BLOCK", 2)
    assert [*ImageFolder(tmp_path, 8, train=True).files] == expected and len(expected) == 6


def test_folder_of_very_many_files_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, 4)
    for limit, num_warnings in ((5, 0), (4, 1), (2, 1)):
        monkeypatch.setattr(folder_listing, "_MANY_FILES", limit)
        caplog.clear()
        ImageFolder(tmp_path, 8, train=True)
        assert len([r for r in caplog.records if "tar shards start faster" in r.message]) == num_warnings


def test_packed_strings_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_strings, "MAX_BYTES_IN_MEMORY", 1)
    tracemalloc.start()
    names = PackedStrings(f"{number:030d}.jpg" for number in range(20_000))
    train, val = split_files(names, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a list of these strings takes 91 bytes per name; the split needs a number per name
    assert len(train) + len(val) == len(names) and peak < 20 * len(names)


def is_mapped(array: np.ndarray) -> bool:
    """Return whether an array is in a file that is mapped into memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def test_packed_strings_behave_like_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a list of many strings would copy them to every worker process."""
    odd = ["a/1.jpg", "", "日本/☃.png", "\udcff.jpg", "x" * 300]
    names = PackedStrings(odd)
    monkeypatch.setattr(packed_strings, "MAX_BYTES_IN_MEMORY", 1)
    in_file = PackedStrings(odd)
    assert [*in_file] == [*names] and is_mapped(in_file.content) and not is_mapped(names.content)
    assert [*pickle.loads(pickle.dumps(in_file))] == odd
    assert [*names] == odd and names[-2] == odd[-2] and "" in names and len(names) == 5 and not len(PackedStrings([]))
    with pytest.raises(IndexError):
        names[5]
    (tmp_path / "1.jpg").write_bytes(GOOD)
    assert isinstance(ImageFolder(tmp_path, 8, train=True).files, PackedStrings)


def test_folders_without_usable_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"existing folder of images, got .*nowhere"):
        ImageFolder(tmp_path / "nowhere", 8, train=True)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"data=webdataset.*notes.txt"):
        ImageFolder(tmp_path / "notes.txt", 8, train=True)
    with pytest.raises(ValueError, match=r"must contain \.jpg.*got 1 files of other types"):
        ImageFolder(tmp_path, 8, train=True)
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(TRUNCATED)
    with pytest.raises(ValueError, match="must contain a usable image, got 0 images, 2 skipped: 1 truncated, 1 empty"):
        ImageFolder(tmp_path, 8, train=True)


def test_images_for_the_initialization_need_no_order_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of 10^9 images would take 8 GB in every process."""

    class ManyImages(Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"images": torch.tensor(index)}

    monkeypatch.setattr(torch, "randperm", None)
    loader = DataLoader(ManyImages())
    ranks = [SimpleNamespace(train_dataloader=loader, global_rank=rank, world_size=2) for rank in range(2)]
    chosen = [torch.cat(list(training_images(rank, 6, 4))).tolist() for rank in ranks]
    assert len({*chosen[0], *chosen[1]}) == 12


def test_split_is_stable_when_files_are_added() -> None:
    files = [f"{i}.jpg" for i in range(1000)]
    train, val = split_files(files, 0.1)
    assert sorted([*train, *val]) == sorted(files) and 60 < len(val) < 140
    assert [*train] == [file for file in files if file not in val]
    more_train, more_val = split_files([*files, *(f"new/{i}.jpg" for i in range(500))], 0.1)
    assert set(train) <= set(more_train) and set(val) <= set(more_val)


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("val_fraction", [0.001, 0.999])
def test_no_side_of_a_split_is_empty(count: int, val_fraction: float) -> None:
    train, val = split_files([f"{i}.jpg" for i in range(count)], val_fraction)
    assert train and val and len(train) + len(val) == count


def test_split_fraction_is_checked() -> None:
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\), got 1.5"):
        split_files(["a", "b"], 1.5)
    with pytest.raises(ValueError, match=r"val_fraction must be 0 for fewer than two usable images, got 0.1"):
        split_files(["a"], 0.1)


def test_split_is_independent_of_the_seed(tmp_path: Path) -> None:
    make_folder(tmp_path, 20)
    # So a run does not validate on images that a run with another seed trained on.
    sides = [ImageFolder(tmp_path, 8, train=seed == 3, val_fraction=0.3, seed=seed) for seed in (3, 4)]
    assert set(sides[0].files).isdisjoint(sides[1].files) and len(sides[0]) + len(sides[1]) == 20
    assert [*sides[0].held_out().files] == [*sides[1].files]
    assert len(ImageFolder(tmp_path, 8, train=False)) == 20  # without a split, the whole folder


def test_folder_data_scans_once_and_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = folder_data(make_folder(tmp_path / "a", 12, bad=(5,)), 8, batch_size=4, val_fraction=0.2)
    data.teardown("fit")
    assert len(data.train) + len(data.val) == 11
    assert [r.levelno for r in caplog.records] == [logging.WARNING, logging.INFO, logging.INFO]
    assert caplog.messages[2].endswith(f"{len(data.train)} images for training, {len(data.val)} for validation")
    other = make_folder(tmp_path / "b", 3)
    data = folder_data(tmp_path / "a", 8, batch_size=4, val_root=other)
    assert (len(data.train), len(data.val)) == (11, 3)
    assert folder_data(tmp_path / "a", 8, batch_size=4, val_fraction=0.0).val is None


# --------------------------------------------------------------------------------------------------------------- shards


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@needs_bad
def test_corrupt_image_in_a_shard_is_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dataset = ImageShards(str(BAD / "mixed.tar"), 32, train=False)
    for _ in range(2):
        assert [sample["images"].shape for sample in dataset] == [(3, 32, 32)] * 4
    assert len(warnings_of(caplog)) == 1 and "0002.jpg: truncated" in warnings_of(caplog)[0]
    assert str(dataset.skip_counter) == "4 images, 1 skipped: 1 truncated"
    assert caplog.records[-1].getMessage() == f"{BAD / 'mixed.tar'}: 4 images, 1 skipped: 1 truncated"


@needs_bad
def test_truncated_shard_is_used_up_to_the_damage(caplog: pytest.LogCaptureFixture) -> None:
    dataset = ImageShards(str(BAD / "cut.tar"), 32, train=False)
    assert len(list(dataset)) == 3  # 0000, 0001 and 0003; 0002 is truncated, and 0005 is cut off
    assert "cut.tar: broken shard" in warnings_of(caplog)[-1]
    assert str(dataset.skip_counter) == "3 images, 2 skipped: 1 truncated, 1 broken shard"
    both = ImageShards([str(BAD / "cut.tar"), str(BAD / "mixed.tar")], 32, train=False)
    assert len(list(both)) == 7


@needs_bad
def test_file_that_is_not_a_tar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not_a.tar must be a tar file"):
        ImageShards([str(BAD / "mixed.tar"), str(BAD / "not_a.tar")], 32, train=True)


def test_last_sample_before_a_truncation_is_used(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"0.jpg": GOOD, "1.jpg": GOOD, "2.jpg": GOOD})
    size = 512 + (len(GOOD) + 511) // 512 * 512
    path.write_bytes(path.read_bytes()[: 2 * size + 600])
    assert len(list(ImageShards(str(path), 8, train=False))) == 2


def test_samples_are_grouped_by_name_and_labels_are_read(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar",
        {
            "0.cls": b"7",
            "0.jpg": GOOD,
            "0.seg.png": encoded(Image.new("RGB", (8, 8)), "PNG"),
            "1.txt": b"no image",
            "d/2.v1.JPG": GOOD,
            "._3.jpg": b"finder",
        },
    )
    assert [set(sample) for sample in ImageShards(str(path), 8, train=False)] == [{"images"}] * 2
    labeled = ImageShards(str(path), 8, train=False, labels=True)
    (sample,) = labeled
    assert sample["label"] == 7 and sample["images"].std() > 0
    assert str(labeled.skip_counter) == "1 image, 1 skipped: 1 without label"


def test_urls_expand_braces_globs_and_lists(tmp_path: Path) -> None:
    paths = [str(numbered_tar(tmp_path / f"t-{i:02d}.tar", range(i, i + 1))) for i in range(4)]
    prefix = f"{tmp_path}/t-"
    assert expand_urls(prefix + "{00..03}.tar") == paths
    assert expand_urls(prefix + "*.tar") == paths
    assert expand_urls(f"{paths[0]}, {prefix}{{02,03}}.tar") == [paths[0], *paths[2:]]
    assert expand_urls([paths[1], prefix + "{00,{02..03}}.tar"]) == [paths[1], paths[0], *paths[2:]]
    assert expand_urls("http://host/a-{0..1}.tar,hf://b.tar") == [
        "http://host/a-0.tar",
        "http://host/a-1.tar",
        "hf://b.tar",
    ]
    assert expand_urls("pipe:cat x | cut -f 1,2") == ["pipe:cat x | cut -f 1,2"]
    odd = str(numbered_tar(tmp_path / "a,{1} b.tar", range(1)))
    assert expand_urls(odd) == [odd]


@pytest.mark.parametrize("pattern", ["none-*.tar", "none.tar", "a-{0..1}.tar"])
def test_missing_shards_are_refused(pattern: str, tmp_path: Path) -> None:
    numbered_tar(tmp_path / "a-0.tar", range(1))
    with pytest.raises(FileNotFoundError, match=r"none|a-1.tar"):
        ImageShards(f"{tmp_path}/{pattern}", 8, train=True)


def test_shard_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="urls must name at least one shard, got ''"):
        ImageShards("", 8, train=True)
    path = str(numbered_tar(tmp_path / "a.tar", range(1)))
    with pytest.raises(ValueError, match="shuffle must be at least 0, got -1"):
        ImageShards(path, 8, train=True, shuffle=-1)


@pytest.mark.parametrize("files", [{}, {"0.txt": b"x"}, {"0.jpg": TRUNCATED, "1.jpg": b""}])
@pytest.mark.parametrize("train", [True, False])
def test_local_shards_without_usable_images_are_refused_at_construction(
    files: dict[str, bytes], train: bool, tmp_path: Path
) -> None:
    path = make_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=r"a.tar must contain a usable image, got 0 images"):
        ImageShards(str(path), 8, train=train)


def test_remote_shards_without_usable_images_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_CONSECUTIVE_SKIPS", 20)
    corrupt = make_tar(tmp_path / "a.tar", {"0.jpg": TRUNCATED, "1.jpg": b""})
    with pytest.raises(ValueError, match="20 consecutive unusable ones: 0 images, 2 skipped: 1 truncated, 1 empty"):
        next(iter(ImageShards(f"pipe:cat {corrupt}", 8, train=True)))
    no_images = make_tar(tmp_path / "b.tar", {"0.txt": b"x"})
    with pytest.raises(ValueError, match="2 shards without any: 0 images, 1 skipped: 1 broken shard"):
        next(iter(ImageShards([f"pipe:cat {no_images}", "pipe:false"], 8, train=True)))


def test_pipe_command_is_read_like_a_file(tmp_path: Path) -> None:
    path = numbered_tar(tmp_path / "a.tar", range(5))
    assert [red(sample) for sample in ImageShards(f"pipe:cat {path}", 8, train=False)] == list(range(5))


def test_training_stream_is_endless_and_reaches_every_image(tmp_path: Path) -> None:
    for i in range(3):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 10, i * 10 + 10))
    dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=10)
    seen = [red(sample) for sample in islice(dataset, 300)]
    assert set(seen) == set(range(30))
    assert seen[:30] != sorted(seen[:30])


def test_training_streams_depend_on_seed_rank_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 10, i * 10 + 10))

    def stream(seed: int = 0, rank: int = 0) -> list[int]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=20, seed=seed)
        return [red(sample) for sample in islice(dataset, 60)]

    assert stream() == stream()
    assert stream() != stream(seed=1)
    assert stream() != stream(rank=1)
    dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=20)
    first, second = ([red(sample) for sample in islice(dataset, 60)] for _ in range(2))
    assert first != second


def test_each_training_worker_has_its_own_reproducible_stream(tmp_path: Path) -> None:
    numbered_tar(tmp_path / "a.tar", range(50))

    def epochs() -> list[list[int]]:
        dataset = ImageShards(f"{tmp_path}/a.tar", 8, train=True, shuffle=50)
        loader = ImageDataModule(dataset, None, batch_size=10, num_workers=2, seed=4).train_dataloader()
        return [[red({"images": image}) for b in islice(loader, 4) for image in b["images"]] for _ in range(2)]

    first, second = epochs()
    assert first[:10] != first[10:20] and first != second
    assert epochs() == [first, second]


def test_restarted_workers_do_not_repeat_their_stream(tmp_path: Path) -> None:
    numbered_tar(tmp_path / "a.tar", range(50))
    dataset = ImageShards(f"{tmp_path}/a.tar", 8, train=True, shuffle=50, flip=False)
    loader = DataLoader(dataset, 10, num_workers=1, generator=torch.Generator().manual_seed(0))
    first, second = (next(iter(loader))["images"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_reads_every_image_once(shards: int, num_workers: int, tmp_path: Path) -> None:
    for i in range(shards):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 7, i * 7 + 7))
    dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=False)
    loader = DataLoader(dataset, 3, num_workers=num_workers, persistent_workers=num_workers > 0)
    for _ in range(2):
        seen = [red({"images": image}) for batch in loader for image in batch["images"]]
        assert sorted(seen) == list(range(7 * shards))
        assert str(dataset.skip_counter) == f"{7 * shards} images, 0 skipped"


@pytest.mark.parametrize("shards", [1, 3])
def test_validation_is_split_between_ranks(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(shards):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 7, i * 7 + 7))
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        seen.append([red(sample) for sample in ImageShards(f"{tmp_path}/*.tar", 8, train=False)])
    assert sorted(seen[0] + seen[1]) == list(range(7 * shards)) and seen[0] and seen[1]


def test_corrupt_image_is_warned_about_once_across_workers(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"0.jpg": GOOD, "1.jpg": TRUNCATED, "2.jpg": GOOD})
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("clipgen").addHandler(handler)
    try:
        dataset = ImageShards(f"{tmp_path}/a.tar", 8, train=True, shuffle=4)
        for _ in islice(DataLoader(dataset, 4, num_workers=2), 20):
            pass
    finally:
        logging.getLogger("clipgen").removeHandler(handler)
    assert "1 skipped: 1 truncated" in str(dataset.skip_counter)
    assert 1 <= (tmp_path / "log").read_text().count("skipped") <= 2  # two workers may read it at the same time


@needs_cifar
def test_cifar10_shards_load_with_labels() -> None:
    train = ImageShards(str(CIFAR10 / "train-{000000..000009}.tar"), 32, train=True)
    assert len(train.urls) == 10
    batch = next(iter(DataLoader(train, 8)))
    assert batch["images"].shape == (8, 3, 32, 32)
    val = ImageShards(str(CIFAR10 / "val-*.tar"), 32, train=False, labels=True)
    batch = next(iter(DataLoader(val, 200)))
    assert batch["label"].unique().tolist() == list(range(10))


# -------------------------------------------------------------------------------- the data module and its configuration


class Probe(pl.LightningModule):
    """Records the images of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.validated = 0

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(tuple(red({"images": image}) for image in batch["images"]))
        return self.weight * batch["images"].mean()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validated += len(batch["images"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageDataModule, checkpoint: Path | None = None, **options: object) -> tuple[Probe, pl.Trainer]:
    trainer = pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **QUIET, **options)
    probe = Probe()
    trainer.fit(probe, data, ckpt_path=checkpoint)
    return probe, trainer


def test_training_on_a_folder_resumes_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "photos", 11, bad=(3,))

    def data() -> ImageDataModule:
        return folder_data(tmp_path / "photos", 8, batch_size=4, val_fraction=0.1, flip=False, seed=1)

    uninterrupted, _ = fit(data(), max_epochs=3)
    assert len(uninterrupted.seen) == 6 and all(len(batch) == 4 for batch in uninterrupted.seen)
    assert uninterrupted.seen[:2] != uninterrupted.seen[2:4]
    assert uninterrupted.validated == 3
    half, trainer = fit(data(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(data(), tmp_path / "half.ckpt", max_epochs=3)
    assert half.seen + rest.seen == uninterrupted.seen


def test_overfit_batches_repeats_the_same_batch(tmp_path: Path) -> None:
    probe, _ = fit(
        folder_data(make_folder(tmp_path, 9), 8, batch_size=4, val_fraction=0), overfit_batches=1, max_epochs=3
    )
    assert len(set(probe.seen)) == 1


def test_training_on_shards_logs_skipped_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    numbered_tar(tmp_path / "train.tar", range(10))
    make_tar(tmp_path / "val.tar", {"0.jpg": GOOD, "1.jpg": TRUNCATED})
    data = shard_data(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", 8, batch_size=4, num_workers=1)
    probe, _ = fit(data, max_steps=5, val_check_interval=5, check_val_every_n_epoch=None)
    assert len(probe.seen) == 5 and probe.validated == 1
    assert f"{tmp_path}/val.tar: 1 image, 1 skipped: 1 truncated" in caplog.messages
    assert any(message.startswith(f"{tmp_path}/train.tar: ") for message in caplog.messages)


def test_data_module_arguments_are_checked() -> None:
    dataset = TensorDataset(torch.zeros(6, 3, 8, 8))
    for options, message in [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 7}, "data.batch_size must be at most 6, the training images, got 7"),
        ({"batch_size": 2, "num_workers": -1}, "num_workers must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageDataModule(dataset, None, **options)
    data = ImageDataModule(dataset, dataset, batch_size=4)
    assert len(data.train_dataloader()) == 1  # full batches only
    assert [len(batch[0]) for batch in data.val_dataloader()] == [4, 2]
    assert ImageDataModule(dataset, None, batch_size=4).val_dataloader() == []


def test_loader_fetches_whole_batches_from_the_dataset() -> None:
    class Batched(TensorDataset):
        calls: ClassVar[list[list[int]]] = []

        def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
            self.calls.append(indices)
            return [{"images": self.tensors[0][i]} for i in indices]

    dataset = Batched(torch.zeros(6, 3, 8, 8))
    list(ImageDataModule(dataset, dataset, batch_size=3).train_dataloader())
    assert [len(call) for call in dataset.calls] == [3, 3]


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_bundled_configs_make_the_data_module(name: str, tmp_path: Path) -> None:
    make_folder(tmp_path, 20)
    numbered_tar(tmp_path / "a.tar", range(4))
    config = OmegaConf.create({"seed": 5, "data": OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")})
    assert config.data.image_size == 256 and config.data.batch_size == 16
    urls = {"train_urls": f"{tmp_path}/a.tar", "val_urls": None}
    config.data.update({"root": str(tmp_path)} if name == "folder" else urls)
    data = instantiate(config.data, _convert_="all")
    assert isinstance(data, ImageDataModule) and data.seed == 5
    assert next(iter(data.train))["images"].shape == (3, 256, 256)


def resumed(dataset: ImageShards, start: int, sizes: list[int] | None = None) -> ImageShards:
    """Resume a stream after a number of samples; the sizes of the shards are known if they have been read."""
    dataset.resume(None, 1)
    state = dataset.state_after(start, 1)
    dataset.resume(state | {"sizes": torch.tensor(sizes)} if sizes else state, 1)
    return dataset


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_stream_resumed_on_other_devices_repeats_and_omits_no_image(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another batch size, too. The count of what all ranks have consumed is what a checkpoint stores."""
    for i in range(6):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 10, i * 10 + 10))

    def on_ranks(world: int, state: dict | None, batch_size: int, batches: int) -> tuple[list[int], dict]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        seen, sizes = [], []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=15)
            dataset.resume(state, batch_size)
            seen += [red(sample) for sample in islice(dataset, batches * batch_size)]
            new_state = dataset.state_after(batches, 1)
            sizes.append(new_state["sizes"])
        # as the ranks of a run do
        return seen, new_state | {"sizes": torch.stack(sizes).amax(0)}

    first, state = on_ranks(before, None, batch_size=3, batches=4)
    left = 60 - len(first)
    rest, _ = on_ranks(after, state, batch_size=1, batches=left // after)
    assert len(first) + len(rest) == 60 and sorted(first + rest) == list(range(60))


def test_position_on_other_devices_does_not_change_while_shards_are_read(tmp_path: Path) -> None:
    """A stream that stopped at the very end of a pass does not know yet that the pass has ended."""
    for i in range(2):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 10, i * 10 + 10))
    dataset = ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=5)
    dataset.resume(None, 1)
    state = dataset.state_after(20, 1)
    dataset.resume(state, 1)
    before = dataset.state_after(0, 2)["position"]
    assert len(list(islice(dataset, 50))) == 50 and (dataset._sizes == 10).all()
    assert dataset.state_after(0, 2)["position"] == before


@pytest.mark.parametrize("slices_per_segment", [8, 1])
def test_resumed_stream_is_identical_and_decodes_nothing_it_skips(
    slices_per_segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any position on, also between broken images, the stream equals that of an uninterrupted run."""
    files = {
        f"{i}.png": (b"" if i in (1, 2, 6) else encoded(Image.new("RGB", (9, 9), (10 * i, 0, 0)), "PNG"))
        for i in range(8)
    }
    make_tar(tmp_path / "a.tar", files)
    make_tar(tmp_path / "b.tar", {"9.jpg": TRUNCATED, "8.png": encoded(Image.new("RGB", (9, 9), (90, 0, 0)), "PNG")})

    def stream(start: int, count: int) -> list[torch.Tensor]:
        dataset = resumed(ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=3), start)
        decoded.clear()
        return [sample["images"] for sample in islice(dataset, count)]

    monkeypatch.setattr(shard_order, "SLICES_PER_SEGMENT", slices_per_segment)
    decoded: list[int] = []
    decode = shards_module.decode_image
    monkeypatch.setattr(shards_module, "decode_image", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    expected = stream(0, 60)
    assert len({image.mean().item() for image in expected}) == 6
    for start in range(30):
        assert all(map(torch.equal, stream(start, 10), expected[start:]))
    assert len(stream(59, 1)) == 1 and len(decoded) < 10


def test_late_resume_rereads_at_most_one_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the run was; and the stream continues with the same images."""
    for i in range(3):
        numbered_tar(tmp_path / f"{i}.tar", range(i * 10, i * 10 + 10))
    monkeypatch.setattr(shard_order, "SLICES_PER_SEGMENT", 2)
    read: list[int] = []
    files = shards_module.read_members
    monkeypatch.setattr(shards_module, "read_members", lambda *a, **k: map(tell, files(*a, **k)))

    def tell(file: Member) -> Member:
        read.append(1)
        return file

    def stream(start: int, count: int) -> list[int]:
        dataset = resumed(ImageShards(f"{tmp_path}/*.tar", 8, train=True, shuffle=5), start, sizes=[10, 10, 10])
        read.clear()
        return [red(sample) for sample in islice(dataset, count)]

    expected = stream(0, 250)
    assert all(stream(start, 30) == expected[start : start + 30] for start in (0, 1, 19, 20, 21, 139))
    # every image once per pass, and each pass in its own order
    passes = [expected[start : start + 30] for start in range(0, 240, 30)]
    assert all(sorted(images) == list(range(30)) for images in passes) and len(set(map(tuple, passes))) == 8
    assert stream(239, 1) == [expected[239]] and len(read) < 40


@pytest.mark.parametrize(("size", "decoded"), [((2000, 1040), (1000, 520)), ((1023, 1200), (1023, 1200))])
def test_large_jpegs_are_decoded_at_reduced_size(size: tuple[int, int], decoded: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (26, 50, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG")
    reduced = decode_image(data, image_size=256)
    assert reduced.size == decoded and decode_image(data).size == size
    crop = val_transform(256)
    assert (crop(reduced) - crop(decode_image(data))).abs().mul(127.5).max() < 5  # levels of 256


def test_consecutive_skips_are_reset_by_a_usable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_CONSECUTIVE_SKIPS", 3)
    make_tar(tmp_path / "a.tar", {"0.jpg": TRUNCATED, "1.jpg": TRUNCATED, "2.jpg": GOOD})
    assert len(list(islice(ImageShards(f"{tmp_path}/a.tar", 8, train=True, shuffle=0), 20))) == 20


def test_parallel_map_keeps_the_order_and_bounds_prefetch():
    started = []

    def slow_at_first(item: int) -> int:
        started.append(item)
        time.sleep(0.02 if item == 0 else 0)
        return 2 * item

    results = parallel_map(slow_at_first, range(10 * MAX_PENDING))
    assert next(results) == 0 and len(started) <= MAX_PENDING + 1
    assert [0, *results] == list(range(0, 20 * MAX_PENDING, 2))
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda item: 1 / item, [1, 0]))


def test_parallel_map_stops_when_its_results_are_not_read():
    started = []

    def slow(item: int) -> None:
        started.append(item)
        time.sleep(0.05)

    results = parallel_map(slow, range(100))
    next(results)
    results.close()
    assert len(started) <= 3 * NUM_THREADS < MAX_PENDING * 2

"""The ImageSource protocol: every source of images implements it, and a new one needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from image_data import encoded, make_tar, random_image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from clipgen import precompute
from clipgen.data.chunks import index_ranges, iter_batches
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.folder import ImageFolder
from clipgen.data.huggingface import HuggingFaceImages
from clipgen.data.shapes import ShapesDataset
from clipgen.data.source import ImageCount, ImageSource, Views, count_images, require_source
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.data.webdataset import ImageShards


def make_source(name: str, folder: Path) -> ImageSource:
    """Make a source of six images of 8 x 8 pixels."""
    if name == "shapes":
        return ShapesDataset(6, image_size=8)
    files = {f"{number}.png": encoded(random_image(seed=number), "PNG") for number in range(6)}
    if name == "webdataset":
        for half in range(2):
            make_tar(folder / f"{half}.tar", dict(list(files.items())[3 * half : 3 * half + 3]))
        return ImageShards(f"{folder}/*.tar", 8, train=True)
    if name == "huggingface":
        return HuggingFaceImages([{"image": {"bytes": content}} for content in files.values()], 8, train=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return ImageFolder(folder, 8, train=True)


@pytest.mark.parametrize("name", ["folder", "webdataset", "huggingface", "shapes"])
def test_chunks_of_a_source_hold_all_images_and_can_be_read_in_any_order(name, tmp_path):
    source = require_source(make_source(name, tmp_path))
    chunks = source.split_into_chunks(4)
    assert len(chunks) == 2
    assert source.count_images().images == 6
    views = {index: list(source.augmented_views(chunks[index], 1)) for index in (1, 0)}
    again = [list(source.augmented_views(chunk, 1)) for chunk in chunks]
    images = torch.cat([image for index in (0, 1) for image, _ in views[index]])
    assert images.shape == (6, 3, 8, 8) and len(images.unique(dim=0)) == 6
    assert torch.equal(images, torch.cat([image for chunk in again for image, _ in chunk]))
    assert all(label is None for index in (0, 1) for _, label in views[index])


@pytest.mark.parametrize("name", ["folder", "webdataset", "huggingface"])
def test_augmented_views_differ_and_are_reproducible(name, tmp_path):
    source = make_source(name, tmp_path)
    chunk = source.split_into_chunks(4)[0]
    first, second = ([views for views, _ in source.augmented_views(chunk, 3)] for _ in range(2))
    assert first[0].shape == (3, 3, 8, 8) and any(not torch.equal(views[0], views[1]) for views in first)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["folder", "webdataset", "shapes"])
def test_content_id_changes_with_the_images(name, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = make_source(name, tmp_path / "a").content_id()
    assert make_source(name, tmp_path / "b").content_id() == first
    if name == "shapes":
        assert ShapesDataset(6, image_size=8, seed=1).content_id() != first
        return
    changed = sorted((tmp_path / "b").iterdir())[0]
    content = encoded(random_image(seed=9), "PNG")
    make_tar(changed, {"0.png": content}) if name == "webdataset" else changed.write_bytes(content)
    pattern = f"{tmp_path}/b/*.tar"
    source = ImageShards(pattern, 8, train=True) if name == "webdataset" else ImageFolder(tmp_path / "b", 8, train=True)
    assert source.content_id() != first


def test_batches_of_a_chunk_have_at_most_the_batch_size():
    source = ShapesDataset(10, labels=True)
    (chunk,) = source.split_into_chunks(10)
    batches = list(iter_batches(source, chunk, num_views=1, batch_size=4))
    assert [images.shape[0] for images, _ in batches] == [4, 4, 2]
    assert all(isinstance(label, int) for _, labels in batches for label in labels)
    assert index_ranges(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]


def test_counts_of_other_datasets():
    assert count_images(TensorDataset(torch.zeros(6))) == ImageCount(6)
    assert count_images(None) is None
    assert str(ImageCount(30, 3)) == "about 30 in 3 shards (estimated from the first)"


class GrayLevels(Dataset):
    """A new source: images of a single gray level each, with nothing but the members of the protocol."""

    labels = False
    class_names = None
    skip_counter = None

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": torch.full((3, 32, 32), index / self.length)}

    def split_into_chunks(self, size: int) -> Sequence[range]:
        return index_ranges(self.length, size)

    def augmented_views(self, chunk: range, num_views: int) -> Iterator[Views]:
        for index in chunk:
            yield self[index]["images"].expand(num_views, 3, 32, 32), None

    def file_names(self) -> list[str]:
        return []

    def content_id(self) -> str:
        return f"gray levels {self.length}"

    def count_images(self) -> ImageCount:
        return ImageCount(self.length)


def test_new_source_trains_and_fills_a_token_cache(tmp_path, tiny_vqgan, shapes_clip):
    data = ImageDataModule(GrayLevels(10), GrayLevels(4), batch_size=5)
    assert next(iter(data.train_dataloader()))["images"].shape == (5, 3, 32, 32)
    assert precompute.write_token_cache(tmp_path, data, tiny_vqgan, shapes_clip, {}, augmentations=2, shard_size=4)
    assert len(TokenCacheDataset(tmp_path / "train")) == 10 and len(TokenCacheDataset(tmp_path / "val")) == 4
    data.teardown("fit")


def test_dataset_that_is_not_a_source_cannot_be_encoded():
    with pytest.raises(TypeError, match=r"TensorDataset must implement clipgen\.data\.source\.ImageSource"):
        require_source(TensorDataset(torch.zeros(6)))

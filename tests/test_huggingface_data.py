"""Images in the rows of a table: samples, broken rows, classes, the split, exact resume; and how datasets loads them.

The package datasets is large, so most tests use lists of rows or a stand-in for it. The last ones need the package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from commands import VQGAN
from image_data import TRUNCATED, Probe, encoded, fit, red
from PIL import Image
from test_resume import stopped_and_resumed

from clipgen import precompute
from clipgen.data import huggingface
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.huggingface import HuggingFaceImages, RowsWithout, huggingface_data, load_rows, split_rows
from clipgen.data.samplers import DataPositionCallback
from clipgen.data.token_cache import TokenCacheDataset

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason='needs the package datasets: pip install -e ".[hub]"'
)


def image_bytes(level: int) -> bytes:
    return encoded(Image.new("RGB", (24, 18), (level, 0, 0)), "PNG")


def make_rows(count: int, bad: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Return rows whose images have the red values 0, 10, 20, ..., and whose classes are 0, 1, 2, 0, ..."""
    rows = []
    for number in range(count):
        content = TRUNCATED if number in bad else image_bytes(10 * number)
        rows.append({"image": {"bytes": content, "path": f"{number}.png"}, "label": number % 3})
    return rows


# --------------------------------------------------------------------------------------------------- rows and samples


def test_broken_row_is_replaced_by_the_next_usable_one_and_counted():
    dataset = HuggingFaceImages(make_rows(4, bad=(1, 3)), 8, train=False, name="photos train")
    assert [red(sample) for sample in dataset] == [0, 20, 20, 0]
    assert dataset[0]["images"].shape == (3, 8, 8)
    assert str(dataset.skip_counter) == "2 images, 2 skipped: 2 truncated"
    with pytest.raises(IndexError):
        dataset[4]


def test_row_without_image_is_skipped(tmp_path):
    images = [None, {"bytes": None, "path": None}, {"bytes": image_bytes(50)}]
    dataset = HuggingFaceImages([{"image": image} for image in images], 8, train=False)
    assert [red(sample) for sample in dataset] == [50] * 3
    assert str(dataset.skip_counter) == "1 image, 2 skipped: 2 empty"


def test_row_may_name_a_file_of_the_dataset_and_no_other(tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("own/a.png", "private.png"):
        (tmp_path / name).write_bytes(image_bytes(50))
    (tmp_path / "own" / "link.png").symlink_to(tmp_path / "private.png")
    names = ["own/a.png", "own/none.png", "private.png", "own/../private.png", "own/link.png"]
    rows = [{"image": {"bytes": None, "path": str(tmp_path / name)}} for name in names]
    dataset = HuggingFaceImages(rows, 8, train=False, root=tmp_path / "own")
    assert [red(sample) for sample in dataset] == [50] * 5
    assert str(dataset.skip_counter) == "1 image, 4 skipped: 4 unreadable"
    with pytest.raises(ValueError, match="must contain a usable image"):
        HuggingFaceImages(rows, 8, train=False)


def test_table_without_any_usable_image_is_refused_at_once():
    with pytest.raises(ValueError, match=r"rows must contain a usable image in column image, got 0 images, 3 skipped"):
        HuggingFaceImages(make_rows(3, bad=(0, 1, 2)), 8, train=True)


def test_crops_depend_on_seed_epoch_and_row_only():
    rows = [{"image": {"bytes": encoded(Image.effect_noise((40, 24), 90), "PNG")}} for _ in range(2)]
    first, second = (HuggingFaceImages(rows, 8, train=True, seed=3) for _ in range(2))
    assert torch.equal(first[(5, 1)]["images"], second[(5, 1)]["images"])
    assert not torch.equal(first[(5, 1)]["images"], first[(6, 1)]["images"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_in_order_with_broken_rows(num_workers, tmp_path):
    def data() -> ImageDataModule:
        rows = make_rows(11, bad=(3,))
        train = HuggingFaceImages(rows, 8, train=True, flip=False, val_fraction=0.1, seed=1)
        return ImageDataModule(train, train.held_out(), 4, num_workers, seed=1)

    def run(data: ImageDataModule, steps: int, checkpoint: Path | None = None) -> tuple[Probe, pl.Trainer]:
        return fit(data, checkpoint, max_steps=steps, callbacks=[DataPositionCallback()])

    uninterrupted, _ = run(data(), 6)
    assert len(uninterrupted.seen) == 6 and uninterrupted.seen[:2] != uninterrupted.seen[2:4]
    assert uninterrupted.validated == 3
    start, trainer = run(data(), 3)  # in the middle of an epoch of two batches
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    resumed = data()
    rest, _ = run(resumed, 6, tmp_path / "start.ckpt")
    assert start.seen + rest.seen == uninterrupted.seen
    assert resumed.train.skip_counter.num_skipped == 1


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("val_fraction", [0.001, 0.3, 0.999])
def test_split_holds_each_row_once_and_no_side_is_empty(count, val_fraction):
    train, val = split_rows(count, val_fraction)
    assert len(train) and len(val)
    assert sorted([*train, *val]) == list(range(count))


def test_split_does_not_depend_on_the_blocks(monkeypatch):
    expected = [[*side] for side in split_rows(100, 0.3)]
    monkeypatch.setattr(huggingface, "_ROWS_PER_BLOCK", 7)
    assert [[*side] for side in split_rows(100, 0.3)] == expected
    assert expected[0] == sorted(expected[0]) and expected[1] == sorted(expected[1])


def test_training_rows_need_no_memory():
    """The numbers of 10^9 rows would take 8 GB in every process."""
    rows = RowsWithout(10**9, np.array([0, 5, 10**9 - 1]))
    assert [rows[0], rows[3], rows[4], rows[len(rows) - 1]] == [1, 4, 6, 10**9 - 2] and len(rows) == 10**9 - 3
    assert split_rows(10**9, 0)[0] == range(10**9)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_split_is_stable_when_rows_are_added():
    few, many = set(split_rows(100, 0.2)[1]), set(split_rows(120, 0.2)[1])
    assert few == {row for row in many if row < 100}


@pytest.mark.parametrize(("count", "val_fraction"), [(10, 1.0), (10, -0.1), (1, 0.5)])
def test_split_fraction_is_checked(count, val_fraction):
    with pytest.raises(ValueError, match="val_fraction must be"):
        split_rows(count, val_fraction)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([2, 0, None, -1], None, [2, 0]),
        ([1, 0, 2, -1], ["cat", "dog"], [1, 0]),
        (["dog", "cat", "cow", None], ["cat", "dog"], [1, 0]),
    ],
)
def test_rows_without_a_known_class_are_skipped(labels, names, expected):
    rows = [{"image": {"bytes": image_bytes(0)}, "label": label} for label in labels]
    dataset = HuggingFaceImages(rows, 8, train=True, label_column="label", class_names=names)
    (chunk,) = dataset.split_into_chunks(10)
    assert [label for _, label in dataset.augmented_views(chunk, 2)] == expected
    assert str(dataset.skip_counter).endswith("2 skipped: 2 without label")


def test_content_id_changes_with_an_image_and_a_broken_row_does_not_stop_it():
    rows = make_rows(3, bad=(1,))
    first = HuggingFaceImages(rows, 8, train=True).content_id()
    assert HuggingFaceImages([*rows[:2], {"image": None}], 8, train=True).content_id() != first


def test_rows_fill_a_token_cache_with_classes(tmp_path, tiny_vqgan, shapes_clip):
    rows = make_rows(10, bad=(4,))
    train = HuggingFaceImages(rows, 32, train=True, label_column="label", val_fraction=0.2)
    data = ImageDataModule(train, train.held_out(), batch_size=4)
    assert precompute.write_token_cache(tmp_path, data, tiny_vqgan, shapes_clip, {}, shard_size=4)
    assert len(TokenCacheDataset(tmp_path / "train")) + len(TokenCacheDataset(tmp_path / "val")) == 9


# --------------------------------------------------------------------------------------- loading, without the package


class Feature:
    """A feature of a column, as `datasets` describes it."""

    def __init__(self, dtype: str = "", names: list[str] | None = None, decode: bool = True) -> None:
        self.dtype = dtype
        self.names = names
        self.decode = decode


class ImageFeature(Feature):
    pass


ImageFeature.__name__ = "Image"


class Table:
    """A stand-in for `datasets.Dataset`, which refuses to return images before they are cast to encoded ones."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows = rows
        self.features = features
        self._fingerprint = "abc"

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        assert type(number) is int
        assert not any(isinstance(feature, ImageFeature) and feature.decode for feature in self.features.values())
        return {name: self.rows[number][name] for name in self.features}

    def select_columns(self, names: list[str]) -> Table:
        return Table(self.rows, {name: self.features[name] for name in names})

    def cast_column(self, name: str, feature: Feature) -> Table:
        return Table(self.rows, self.features | {name: feature})

    def unique(self, name: str) -> list[Any]:
        return list(dict.fromkeys(row[name] for row in self.rows))


@pytest.fixture
def package(monkeypatch) -> Iterator[ModuleType]:
    """Put a stand-in for the package in its place; ``calls`` records the arguments of ``load_dataset``."""
    module: Any = ModuleType("datasets")
    module.calls = []
    module.features = {"image": ImageFeature(), "label": Feature("int64", ["a", "b", "c"]), "text": Feature("string")}

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Table:
        module.calls.append((path, name, options))
        if options["split"] == "wrong":
            raise ValueError('Unknown split "wrong".\nShould be one of train, test.')
        rows = [row | {"text": f"t{10 - number}"} for number, row in enumerate(make_rows(10))]
        return Table(rows, module.features)

    module.load_dataset = load_dataset
    module.Image = ImageFeature
    monkeypatch.setitem(sys.modules, "datasets", module)
    yield module


def test_columns_that_are_not_needed_are_not_read(package):
    data = huggingface_data("owner/photos", 8, 4, val_fraction=0.2, revision="v1", subset="small", cache_dir="cache")
    assert set(data.train.rows.features) == {"image"}
    options = {"revision": "v1", "cache_dir": "cache", "split": "train"}
    assert package.calls == [("owner/photos", "small", options)]
    assert len(data.train) + len(data.val) == 10 and len(data.val) > 0
    assert data.train.skip_counter.name == "owner/photos train"


def test_class_names_come_from_the_column(package):
    data = huggingface_data("photos", 8, 4, labels=True)
    assert data.train.class_names == ["a", "b", "c"] and data.train.labels
    texts = huggingface_data("photos", 8, 4, labels=True, label_column="text", val_fraction=0)
    assert texts.train.class_names == [f"t{number}" for number in range(1, 11)]
    assert [texts.train.label_of(item) for item in range(3)] == [9, 8, 7]
    assert texts.val is None


def test_class_names_of_large_strings_are_known(package):
    package.features["text"] = Feature("large_string")  # as polars writes them
    texts = huggingface_data("photos", 8, 4, labels=True, label_column="text", val_fraction=0).train
    assert texts.class_names == [f"t{number}" for number in range(1, 11)] and texts.label_of(0) == 9


@pytest.fixture
def saved(package, tmp_path) -> Path:
    """Make a folder of which the stand-in says that ``save_to_disk`` wrote its split ``test`` there."""
    (tmp_path / "state.json").touch()

    def load_from_disk(path: str) -> Table:
        table = package.load_dataset(path, split="test")
        table.split = "test"
        return table

    package.load_from_disk = load_from_disk
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_single_saved_split_has_two_names(saved, split):
    assert len(huggingface_data(str(saved), 8, 4, split=split, val_fraction=0).train) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train[:50%]"}, "contains a single split, so data.split must be test or train"),
        ({"split": "validation"}, "contains a single split, so data.split must be test or train"),
        (
            {"val_split": "test"},
            "data.val_split must be null, because .* contains a single split: use data.val_fraction",
        ),
        ({"subset": "small"}, "data.subset must be null, because .* has none, got small"),
        ({"revision": "v1"}, "data.revision must be null, because .* has none, got v1"),
    ],
)
def test_options_without_effect_on_a_saved_split_are_refused(saved, options, message):
    with pytest.raises(ValueError, match=message):
        huggingface_data(str(saved), 8, 4, **options)


@pytest.mark.parametrize("name", ["subset", "revision"])
def test_parquet_files_have_no_subset_and_no_revision(package, name):
    with pytest.raises(ValueError, match=f"data.{name} must be null, because photos.parquet has none, got v1"):
        huggingface_data("photos.parquet", 8, 4, **{name: "v1"})


def test_validation_split_is_loaded_and_not_held_out(package):
    data = huggingface_data("photos", 8, 4, val_split="test")
    assert len(data.train) == len(data.val) == 10
    assert [options["split"] for _, _, options in package.calls] == ["train", "test"]


def test_parquet_files_are_recognized_by_their_name(package):
    load_rows("~/photos/*.parquet", "train")
    path, name, options = package.calls[0]
    assert (path, name) == ("parquet", None)
    assert options["data_files"] == str(Path.home() / "photos" / "*.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "wrong"}, r"data.dataset must be .* with the split wrong, got photos: Unknown split \"wrong\""),
        ({"image_column": "img"}, "data.image_column must be one of image, label, text, got img"),
        ({"labels": True, "label_column": "cls"}, "data.label_column must be one of image, label, text, got cls"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(package, options, message):
    with pytest.raises(ValueError, match=message):
        huggingface_data("photos", 8, 4, **options)


def test_the_only_column_of_images_is_found(package):
    package.features = {"img": {"bytes": Feature("binary"), "path": Feature("string")}}
    with pytest.raises(KeyError, match="img"):  # the rows of the stand-in have another name
        huggingface_data("photos", 8, 4)
    package.features = {"text": Feature("string"), "label": Feature("int64")}
    with pytest.raises(ValueError, match=r"data.image_column must name the column of images, one of text, label"):
        huggingface_data("photos", 8, 4)


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'needs the package datasets: pip install "datasets>=5"'):
        load_rows("photos", "train")


# ------------------------------------------------------------------------------------------ loading, with the package


@pytest.fixture
def parquet(tmp_path, monkeypatch) -> Path:
    """Return a folder with a Parquet file of 20 rows for training, of which one is broken, and one for validation."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "table"
    folder.mkdir()
    for split, count in (("train", 20), ("validation", 4)):
        rows = make_rows(count, bad=(6,))
        columns = {name: [row[name] for row in rows] for name in ("image", "label")}
        table = datasets.Dataset.from_dict(columns | {"text": ["unused"] * count})
        table.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"])).to_parquet(
            folder / f"{split}-00000.parquet"
        )
    return folder


@needs_datasets
def test_parquet_folder_and_saved_table_hold_the_same_images(parquet, tmp_path):
    import datasets

    cache = str(tmp_path / "cache")
    datasets.load_dataset("parquet", data_files=f"{parquet}/train*.parquet", cache_dir=cache).save_to_disk(
        str(tmp_path / "saved")
    )
    levels = []
    for name in (f"{parquet}/train-*.parquet", str(parquet), str(tmp_path / "saved")):
        data = huggingface_data(name, 8, 4, val_fraction=0, flip=False, labels=True, cache_dir=cache)
        levels.append([red(sample) for sample in data.train])
        assert data.train.class_names == ["a", "b", "c"]
        assert data.train.skip_counter.num_skipped == 1
    assert levels[0] == levels[1] == levels[2] == [*range(0, 60, 10), 70, *range(70, 200, 10)]
    with_val = huggingface_data(str(parquet), 8, 4, val_split="validation", cache_dir=cache)
    assert (len(with_val.train), len(with_val.val)) == (20, 4)


@needs_datasets
def test_unknown_files_and_splits_are_refused(parquet, tmp_path):
    for name, split in ((str(parquet), "nothing"), (f"{parquet}/none-*.parquet", "train"), ("no/such", "train")):
        with pytest.raises(
            ValueError, match=f"data.dataset must be .* with the split {split}, got {name.split('*')[0]}"
        ):
            load_rows(name, split, cache_dir=str(tmp_path / "cache"))


@needs_datasets
@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_from_parquet_is_bit_identical(call, parquet, tmp_path, num_workers):
    sources = [
        "data=huggingface",
        f"data.dataset={parquet}",
        "data.val_split=validation",
        "data.image_size=32",
        f"data.num_workers={num_workers}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    stopped_and_resumed(call, [*VQGAN, "data.batch_size=4", "trainer.max_steps=7", *sources], 3)


@needs_datasets
@pytest.mark.slow
def test_photos_of_any_shape_survive_the_table(tmp_path):
    import datasets

    images = [Image.fromarray(np.full((30, 20 + number, 3), 9 * number, np.uint8)) for number in range(5)]
    datasets.Dataset.from_dict({"img": images}).to_parquet(tmp_path / "a.parquet")
    data = huggingface_data(f"{tmp_path}/a.parquet", 8, 2, val_fraction=0, cache_dir=str(tmp_path / "cache"))
    assert [red(sample) for sample in data.train] == [0, 9, 18, 27, 36]


@needs_datasets
@pytest.mark.slow
def test_folder_of_images_that_datasets_finds_itself(tmp_path):
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        (tmp_path / "photos" / name).write_bytes(image_bytes(40))
    options = {"val_fraction": 0, "labels": True, "cache_dir": str(tmp_path / "cache")}
    train = huggingface_data(f"{tmp_path}/photos", 8, 2, **options).train
    assert [red(sample) for sample in train] == [40, 40]
    assert train.class_names == ["cat", "dog"] and [train.label_of(item) for item in range(2)] == [0, 1]

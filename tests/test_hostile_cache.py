"""Untrusted token caches and feature stores: what they claim is compared with what they hold."""

from __future__ import annotations

import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_vqgan
from safetensors.torch import load_file, save_file
from test_hostile_checkpoints import little, refused  # noqa: F401  (a fixture)

from clipgen import precompute
from clipgen.data.shapes import shapes_data
from clipgen.data.token_cache import (
    TokenCacheDataModule,
    TokenCacheDataset,
    class_names_of,
    open_shard,
    read_manifest,
    record_dtype,
    write_shard,
)
from clipgen.evaluation import feature_store


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, shapes_clip):
    """A token cache of 20 shapes with their classes."""
    from models import VQGAN_SIZES

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cache") / "cache"
    data = shapes_data(train_size=20, val_size=4, image_size=32, batch_size=8, labels=True)
    assert precompute.write_token_cache(root, data, make_vqgan(**VQGAN_SIZES).eval(), shapes_clip, {}, shard_size=10)
    return root


@pytest.fixture
def cache(encoded, tmp_path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "cache"))


def change_manifest(cache: Path, **changes: object) -> None:
    manifest = json.loads((cache / "manifest.json").read_text()) | changes
    kept = {key: value for key, value in manifest.items() if value is not ...}
    (cache / "manifest.json").write_text(json.dumps(kept))


def change_shard(cache: Path, **columns: object) -> Path:
    """Write values into the third record of the second shard."""
    path = cache / "train" / "shard-000001.npy"
    records = np.load(path)
    for name, value in columns.items():
        records[name][2] = value
    np.save(path, records)
    return path


def test_intact_cache_opens(cache):
    data = TokenCacheDataModule(cache, batch_size=4, conditioning="class")
    assert data.train.batch(range(20))["condition"].shape == (20, 288)
    assert TokenCacheDataModule(cache, batch_size=4).train.batch(range(20))["condition"].isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"images": None},
        {"images": 5},
        {"images": {"train": 20}},
        {"images": {"val": 4}},
        {"images": {"train": 0, "val": 4}},
        {"images": {"train": "20", "val": 4}},
        {"images": {"train": 20, "val": -1}},
        {"images": {"train": 10**30, "val": 4}},
        {"images": {"train": 19, "val": 4}},
        {"num_tokens": ...},
        {"num_tokens": 17},
        {"num_tokens": 10**12},
        {"num_tokens": "16"},
        {"num_tokens": [16]},
        {"codebook_size": 17},
        {"codebook_size": 5_000_000},
        {"codebook_size": 0},
        {"codebook_size": 1e30},
        {"clip_dim": 65},
        {"clip_dim": True},
        {"vqgan": 5},
        {"clip": None},
        {"num_classes": 10**12, "class_names": ...},
        {"num_classes": 2_147_483_647, "class_names": ...},
        {"num_classes": 10**9},
        {"num_classes": "many"},
        {"num_classes": -1},
        {"class_names": 5},
        {"class_names": [1, 2]},
        {"class_names": {"a": 1}},
    ],
)
def test_wrong_manifests_name_the_file(cache, little, changes):  # noqa: F811
    change_manifest(cache, **changes)
    refused(lambda: TokenCacheDataModule(cache, batch_size=4, conditioning="class"), cache)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '"a"', "\x00"])
def test_manifests_that_are_not_json_objects_name_the_file(cache, content):
    (cache / "manifest.json").write_text(content)
    refused(lambda: read_manifest(cache), cache / "manifest.json")


def test_more_unnamed_classes_than_images_are_allowed(cache):
    """Ten images of ImageNet may include one of class 999."""
    change_manifest(cache, class_names=..., num_classes=1000)
    assert len(class_names_of(read_manifest(cache), cache)) == 1000


def test_codebook_size_without_a_table_of_codes_is_bounded(cache):
    weights = cache / "vqgan" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "quantize.embedding.weight"}, weights)
    for path in cache.glob("*/shard-*.npy"):
        records = np.load(path)
        wide = np.zeros(len(records), record_dtype(1, 16, 2**20, 64, True))
        np.save(path, wide)
    change_manifest(cache, codebook_size=2**31)
    refused(lambda: read_manifest(cache), cache / "manifest.json", "codebook_size must be at most")


def test_indices_outside_the_codebook_name_the_shard(cache):
    path = change_shard(cache, indices=16)
    refused(lambda: TokenCacheDataModule(cache, batch_size=4).train.batch(range(20)), path, "got 16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_name_the_shard(cache, value):
    path = change_shard(cache, embedding=value)
    refused(lambda: TokenCacheDataModule(cache, batch_size=4).train.batch(range(20)), path, "finite")
    refused(lambda: TokenCacheDataset(cache / "train").embeddings(), path, "finite")


@pytest.mark.parametrize("value", [288, 2_147_483_646, -1])
def test_labels_outside_the_classes_name_the_shard(cache, value):
    path = change_shard(cache, label=value)
    data = TokenCacheDataModule(cache, batch_size=4, conditioning="class")
    refused(lambda: data.train.batch(range(20)), path, f"got {value}")


def header(text: str) -> bytes:
    written = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(written).to_bytes(2, "little") + written


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': [('a', '<u2'"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (10,), }") + bytes(20),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (10,), }") + bytes(80),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (10**9,), }"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (999999999999999999999999,), }"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (), }") + bytes(2),
        header("(" * 100),
        header("'''"),
        header("\\"),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"\x80\x02.",
        b"",
        bytes(1000),
    ],
)
def test_damaged_shards_name_the_file(cache, content):
    path = cache / "train" / "shard-000000.npy"
    path.write_bytes(content)
    for load in (lambda: open_shard(path), lambda: TokenCacheDataModule(cache, batch_size=4)):
        refused(load, path)


def test_shards_with_other_arrays_name_the_file(cache):
    path = cache / "train" / "shard-000000.npy"
    np.savez(path.with_suffix(""), a=np.zeros(3))
    path.with_suffix(".npz").rename(path)
    refused(lambda: open_shard(path), path)
    for records in (
        np.zeros((2, 2), record_dtype(1, 16, 16, 64)),
        np.zeros(4, [("indices", "<i8", (1, 16)), ("embedding", "<f2", (1, 64))]),
        np.zeros(4, [("indices", ">u2", (1, 16)), ("embedding", "<f2", (1, 64))]),
        np.zeros(4, [("indices", "<u2", (16,)), ("embedding", "<f2", (64,))]),
        np.zeros(4, [("indices", "<u2", (0, 16)), ("embedding", "<f2", (0, 64))]),
        np.zeros(4, [("indices", "<u2", (1, 16))]),
        np.zeros(4, [("indices", "<u2", (1, 16)), ("embedding", "<f2", (1, 64)), ("other", "<f2")]),
    ):
        np.save(path, records)
        refused(lambda: open_shard(path), path)


def test_shards_of_different_types_name_the_file(cache):
    path = cache / "train" / "shard-000001.npy"
    np.save(path, np.zeros(10, record_dtype(1, 16, 16, 32, True)))
    refused(lambda: TokenCacheDataset(cache / "train"), path)


def test_named_pipe_instead_of_a_shard_does_not_block(cache):
    import os

    path = cache / "train" / "shard-000000.npy"
    path.unlink()
    os.mkfifo(path)
    refused(lambda: read_manifest(cache), path)


# --------------------------------------------------------------------------------------------------- what is written


def batches(labels: list[int]):
    yield torch.zeros(len(labels), 1, 3, 32, 32), labels


@pytest.mark.parametrize("label", [10**30, 2**31, -1])
def test_labels_that_do_not_fit_a_record_name_the_shard(tmp_path, tiny_vqgan, shapes_clip, label):
    path = tmp_path / "shard-000000.npy"
    refused(lambda: precompute.encode_shard(path, batches([1, label]), tiny_vqgan, shapes_clip), path, "labels")
    assert not path.exists()


def test_nothing_is_written_through_a_link_out_of_the_cache(tmp_path, tiny_vqgan, shapes_clip):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "train").symlink_to(tmp_path / "elsewhere")
    data = shapes_data(train_size=4, val_size=2, image_size=32, batch_size=2)
    encode = partial(precompute.write_token_cache, tmp_path / "cache", data, tiny_vqgan, shapes_clip, {})
    refused(encode, tmp_path / "cache" / "train", "got a link to")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_embeddings_that_are_not_finite_are_not_written(tmp_path, tiny_vqgan, shapes_clip, monkeypatch):
    monkeypatch.setattr(shapes_clip, "encode_image", lambda images: torch.full((len(images), 64), torch.nan))
    path = tmp_path / "shard-000000.npy"
    refused(lambda: precompute.encode_shard(path, batches([1]), tiny_vqgan, shapes_clip), path, "finite")
    assert not path.exists()


def test_single_large_label_does_not_create_two_billion_classes(tmp_path, little):  # noqa: F811
    shard = np.zeros(3, record_dtype(1, 16, 16, 64, True))
    shard["label"] = [0, 1, 2_147_483_646]
    write_shard(tmp_path / "train" / "shard-000000.npy", shard)
    refused(lambda: precompute.count_classes(tmp_path, 3, None), tmp_path, "2147483646")


# ------------------------------------------------------------------------------------------------------ feature stores


def test_compressed_parts_are_refused_before_they_are_read(tmp_path, little):  # noqa: F811
    path = tmp_path / "part-000000.npz"
    np.savez_compressed(path, key=np.zeros(2**23, np.uint64))
    refused(lambda: feature_store.read_column(path, "key"), path, "compressed")


def test_parts_that_claim_more_than_they_hold_are_refused(tmp_path, little):  # noqa: F811
    path = tmp_path / "part-000000.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", header("{'descr': '<u8', 'fortran_order': False, 'shape': (900000000,), }"))
    refused(lambda: feature_store.read_column(path, "key"), path, "claims 7200000000 bytes")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), header("("), bytes(100)])
def test_damaged_parts_name_the_file(tmp_path, content):
    path = tmp_path / "part-000000.npz"
    path.write_bytes(content)
    refused(lambda: feature_store.read_column(path, "key"), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", content)
    refused(lambda: feature_store.read_column(path, "key"), path)

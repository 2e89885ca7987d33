"""The token cache: its content, interruption and resume, and training from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TRANSFORMER, command
from image_data import GOOD, make_tar
from models import VQGAN_SIZES, make_vqgan
from PIL import Image

from clipgen import precompute
from clipgen.data import token_cache
from clipgen.data.class_names import read_names
from clipgen.data.folder import folder_data
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset, shapes_data
from clipgen.data.token_cache import TokenCacheDataModule, TokenCacheDataset, class_names_of, read_manifest
from clipgen.data.webdataset import shard_data
from clipgen.hardware.device import default_device
from clipgen.hardware.ranks import rank_and_world_size
from clipgen.images import to_pil
from clipgen.tokenizer_identity import saved_identity
from clipgen.training.resume import refuse_other_runs

SOURCE = {"source": {"what": "shapes"}}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data():
    return shapes_data(train_size=50, val_size=10, image_size=32, batch_size=8)


@pytest.fixture
def encode(tiny_vqgan, shapes_clip, data):
    return lambda root, **options: precompute.write_token_cache(
        root, data, tiny_vqgan, shapes_clip, SOURCE, **(dict(shard_size=16, batch_size=7) | options)
    )


@pytest.fixture
def cache(encode, tmp_path) -> Path:
    assert encode(tmp_path / "cache")
    return tmp_path / "cache"


@torch.no_grad()
def test_cache_holds_the_models_outputs(cache, data, tiny_vqgan, shapes_clip):
    dataset = TokenCacheDataset(cache / "train")
    assert len(dataset) == 50 and len(dataset.files) == 4
    images = data.train.render(range(50))
    batch = dataset.batch(list(range(50)))
    assert torch.equal(batch["indices"], tiny_vqgan.encode(images).flatten(1)) and batch["indices"].dtype == torch.int64
    torch.testing.assert_close(batch["condition"], shapes_clip.encode_image(images), atol=2e-3, rtol=0)  # fp16
    torch.testing.assert_close(batch["condition"].norm(dim=1), torch.ones(50))
    assert torch.equal(dataset[33]["indices"], batch["indices"][33])
    for outside in (50, -1):
        with pytest.raises(IndexError, match=rf"in \[0, 50\), got {outside}"):
            dataset[outside]
    manifest = read_manifest(cache)
    assert manifest["images"] == {"train": 50, "val": 10} and manifest["num_tokens"] == 16
    assert manifest["bytes_per_image"] == 16 * 2 + 64 * 2


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="this system does not list open files")
def test_few_shards_are_mapped_at_a_time(cache, monkeypatch):
    """The system limits the number of maps of a process."""
    dataset = TokenCacheDataset(cache / "train")
    expected = dataset.batch(range(len(dataset)))
    monkeypatch.setattr(token_cache, "MAX_MAPS", 1)
    dataset = TokenCacheDataset(cache / "train")
    for order in (range(len(dataset)), range(len(dataset) - 1, -1, -1)):
        batch = dataset.batch(order)
        assert torch.equal(batch["indices"], expected["indices"][list(order)])
        assert len(dataset._open) == 1 < len(dataset.files)


def test_open_shards_hold_no_file_descriptors(cache):
    """A process may open about 1024 files, and a cache of 1024 tar files has as many shards."""
    before, dataset = os.listdir("/dev/fd"), TokenCacheDataset(cache / "train")
    assert len(dataset.batch(range(50))["indices"]) == 50
    assert len(os.listdir("/dev/fd")) == len(before)
    assert not dataset.shard(0).flags.writeable


def test_augmentations_cycle_by_epoch_and_broken_images_are_left_out(shared, tmp_path, tiny_vqgan, shapes_clip):
    data = folder_data(shared / "data" / "bad_images", 32, batch_size=2, val_fraction=0)
    assert precompute.write_token_cache(
        tmp_path / "a", data, tiny_vqgan, shapes_clip, {}, augmentations=3, shard_size=5
    )
    dataset = TokenCacheDataset(tmp_path / "a" / "train")
    assert len(dataset) == len(data.train)  # the usable images
    views = torch.stack([dataset[(epoch, 0)]["indices"] for epoch in range(4)])
    assert torch.equal(views[0], views[3]) and not torch.equal(views[0], views[1])
    assert precompute.write_token_cache(
        tmp_path / "b", data, tiny_vqgan, shapes_clip, {}, augmentations=3, shard_size=5
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_one_augmentation_is_the_center_crop(tmp_path, tiny_vqgan, shapes_clip):
    (tmp_path / "images").mkdir()
    Image.effect_noise((64, 32), 90).convert("RGB").save(tmp_path / "images" / "wide.png")
    data = folder_data(tmp_path / "images", 32, batch_size=1, val_fraction=0)
    precompute.write_token_cache(tmp_path / "cache", data, tiny_vqgan, shapes_clip, {})
    center = folder_data(tmp_path / "images", 32, batch_size=1, val_root=tmp_path / "images").val[0]["images"]
    indices = TokenCacheDataset(tmp_path / "cache" / "train")[0]["indices"]
    assert torch.equal(indices, tiny_vqgan.encode(center[None]).flatten())


def test_augmentations_of_shapes_are_refused(encode, tmp_path):
    with pytest.raises(ValueError, match="augmentations must be 1 for shapes, got 2"):
        encode(tmp_path / "cache", augmentations=2)


def test_ranks_share_the_shards_and_the_last_one_completes_the_cache(encode, cache, tmp_path):
    other = tmp_path / "other"
    assert not encode(other, rank=1, world_size=2)
    with pytest.raises(ValueError, match="is not complete"):
        read_manifest(other)
    assert encode(other, rank=0, world_size=2)
    assert contents(other) == contents(cache)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "4"}, (3, 5)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (2, 3),
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (1, 3)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}, None),
        ({"RANK": "5", "WORLD_SIZE": "2"}, None),
    ],
)
def test_rank_and_world_size_from_the_environment(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected:
        assert rank_and_world_size() == expected
        return
    with pytest.raises(ValueError, match=r"does not fit 2 processes: number them without gaps, such as --array=0-1"):
        rank_and_world_size()


def test_process_that_is_overtaken_completes_the_cache(encode, cache, tmp_path, monkeypatch):
    """The other process finishes its shards while this one writes its last."""
    original, calls = precompute.encode_shard, []

    def overtaken(path, *arguments):
        if path.parent.name == "val" and not calls:
            calls.append(path)
            assert not encode(tmp_path / "other", rank=1, world_size=2)
        original(path, *arguments)

    monkeypatch.setattr(precompute, "encode_shard", overtaken)
    assert encode(tmp_path / "other", rank=0, world_size=2)
    assert calls and contents(tmp_path / "other") == contents(cache)


def test_processes_that_start_together_write_one_cache(encode, cache, tmp_path, monkeypatch):
    """The other process creates the cache while this one does."""
    original, calls = precompute.save_frozen, []

    def overtaken(root, *arguments):
        if not calls:
            calls.append(root)
            encode(root)
            raise FileExistsError(17, "File exists", str(root))
        original(root, *arguments)

    monkeypatch.setattr(precompute, "save_frozen", overtaken)
    assert encode(tmp_path / "other") and contents(tmp_path / "other") == contents(cache)


@pytest.mark.parametrize("setting", ["shard_size=0", "augmentations=1.5", "batch_size=abc"])
def test_settings_are_checked_before_encoding(call, setting):
    done = call("clipgen-encode", "vqgan=nowhere", "output=cache", setting)
    assert done.code == 1 and f"{setting.split('=')[0]} must be a whole number of at least 1, got" in done.stderr


@pytest.mark.parametrize(("local", "expected"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")])
def test_each_process_has_its_own_gpu(monkeypatch, local, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device() == expected


@pytest.mark.parametrize("after", [1, 2, 4])
def test_interrupted_encoding_resumes_to_identical_bytes(encode, cache, tmp_path, monkeypatch, after):
    """Complete shards are kept, and the others are written with the same bytes."""
    encode_shard, count = precompute.encode_shard, []

    def broken(path, batches, *models):
        count.append(path)
        if len(count) == after:
            batches = iter([next(batches), None])  # the second batch is not a batch
        encode_shard(path, batches, *models)

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "encode_shard", broken)
        with pytest.raises(TypeError):
            encode(tmp_path / "other")
    assert len(list((tmp_path / "other").rglob("shard-*.npy"))) == after - 1
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("shard-*.npy")}
    assert encode(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(cache)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # not written again


def test_leftovers_of_interrupted_processes_are_removed(encode, cache, tmp_path):
    other = tmp_path / "other"
    assert not encode(other, rank=1, world_size=2)
    for left in ("train/.shard-000000.npy.123.partial", ".vqgan-ab12/folder/model.safetensors"):
        (other / left).parent.mkdir(parents=True, exist_ok=True)
        (other / left).write_bytes(b"a part")
    assert encode(other)
    assert contents(other) == contents(cache)


def test_cache_of_other_settings_or_models_is_not_extended(encode, cache, data, shapes_clip):
    with pytest.raises(
        ValueError, match="contains results computed with shard_size=16, not 20; choose another output folder"
    ):
        encode(cache, shard_size=20)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="contains results computed with vqgan="):
        precompute.write_token_cache(cache, data, make_vqgan(**VQGAN_SIZES).eval(), shapes_clip, SOURCE, shard_size=16)


@pytest.mark.parametrize("name", ["checkpoints", "transformer"])
def test_models_of_a_run_are_not_replaced_by_those_of_a_cache(encode, tiny_vqgan, tmp_path, name):
    tiny_vqgan.save(tmp_path / "run" / "vqgan")
    (tmp_path / "run" / name).mkdir()
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match=f"output must not contain a model, got .*run with {name}/"):
        encode(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_training_does_not_replace_the_models_of_a_cache(cache):
    with pytest.raises(FileExistsError, match="output must not be a token cache"):
        refuse_other_runs(cache, None)


def test_model_identity_depends_only_on_the_weights(tmp_path, tiny_vqgan, fit):
    """Whichever file holds them."""
    identity = precompute.vqgan_identity(tiny_vqgan)
    assert saved_identity(tiny_vqgan.save(tmp_path / "folder", training=True)) == identity
    averaged = make_vqgan(**VQGAN_SIZES, ema_decay=0.5)
    fit(averaged, 2, batch=4).save_checkpoint(tmp_path / "last.ckpt")
    saved = saved_identity(tmp_path / "last.ckpt")
    assert saved == precompute.vqgan_identity(averaged.eval()) != identity
    assert precompute.clip_identity("ViT-B-32-quickgelu", "openai") == "ViT-B-32-quickgelu openai"
    assert re.fullmatch("[0-9a-f]{16}", precompute.clip_identity("shapes", None))


def test_model_identity_includes_arguments_that_weights_do_not_show():
    """Two orders of the same FSQ levels have the same weights, but other indices."""
    first = make_vqgan(
        **VQGAN_SIZES
        | dict(quantizer_type="fsq", codebook_size=96, codebook_dim=3, fsq_levels=[3, 8, 4], dead_code_reset_after=0)
    )
    second = make_vqgan(
        **VQGAN_SIZES
        | dict(quantizer_type="fsq", codebook_size=96, codebook_dim=3, fsq_levels=[8, 3, 4], dead_code_reset_after=0)
    )
    second.load_tokenizer_(first.active_model.state_dict())
    assert precompute.vqgan_identity(first) != precompute.vqgan_identity(second)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_clip_identity_depends_on_weights_not_on_the_path(tmp_path, name):
    identities = []
    for place, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "open_clip_config.json").write_text("{}")
        (tmp_path / place / name).write_bytes(weights)
        identities.append(precompute.clip_identity(str(tmp_path / place), None))
    assert identities[0] == identities[1] != identities[2]


def test_data_module_loads_full_batches(cache):
    module = TokenCacheDataModule(cache, batch_size=16)
    batches = list(module.train_dataloader())
    assert len(batches) == len(module.train_dataloader()) == 3
    assert batches[0]["indices"].shape == (16, 16) and batches[0]["condition"].shape == (16, 64)
    assert sum(len(batch["indices"]) for batch in module.val_dataloader()) == 10
    workers = list(TokenCacheDataModule(cache, batch_size=16, num_workers=2).train_dataloader())
    assert all(torch.equal(a["indices"], b["indices"]) for a, b in zip(batches, workers))
    with pytest.raises(ValueError, match=r"^data\.batch_size must be in \[1, 50\], got 51"):
        TokenCacheDataModule(cache, batch_size=51)


def test_embeddings_are_evenly_spaced(cache):
    data = TokenCacheDataset(cache / "train")
    conditions = data.batch(range(len(data)))["condition"]
    assert torch.equal(data.embeddings(), conditions)
    assert torch.equal(data.embeddings(len(data) // 3), conditions[::3])


def test_index_type_depends_on_the_codebook_size():
    assert precompute.record_dtype(1, 4, 2**16, 2)["indices"].base == np.uint16
    assert precompute.record_dtype(1, 4, 2**16 + 1, 2)["indices"].base == np.uint32


# ------------------------------------------------------------------------------------------------------------ commands


ENCODE = ["data.train_size=64", "data.val_size=16", "shard_size=16", "device=cpu", "output=cache"]


@pytest.fixture
def encoded(call, tiny_vqgan, tmp_path):
    tiny_vqgan.save(tmp_path / "vqgan")
    result = call("clipgen-encode", "vqgan=vqgan", *ENCODE)
    assert result.code == 0 and "Finished: cache" in result.stdout, result.stderr
    return tmp_path / "cache"


def test_training_from_a_cache_needs_neither_model(call, encoded, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr("clipgen.clip.FrozenCLIP.__init__", refuse)
        patch.setattr("clipgen.vqgan.VQGAN.__init__", refuse)
        arguments = [
            "data=cached",
            f"data.root={encoded}",
            "output=run",
            "trainer.limit_val_batches=0",
        ]  # logs no images
        result = call("clipgen-train", *TRANSFORMER, *arguments)
    assert result.code == 0, result.stderr
    result = call(
        "clipgen-sample",
        "--checkpoint",
        "run",
        "--prompt",
        "a large red star on a white background",
        "--num-images",
        "1",
    )
    assert result.code == 0 and Path("samples/grid.png").is_file(), result.stderr


def test_training_from_a_cache_logs_images(call, encoded, monkeypatch):
    """From validation embeddings and prompts; only the former if the CLIP model cannot be loaded."""
    prompts = "image_logger.prompts=[a large red star on a white background]"
    arguments = ["data=cached", f"data.root={encoded}", prompts, "trainer.max_steps=2"]
    result = call("clipgen-train", *TRANSFORMER, *arguments, "output=run")
    names = [f"{name}_0000002.png" for name in ("from_images", "from_texts")]
    assert result.code == 0 and sorted(path.name for path in Path("run/grids").iterdir()) == names, result.stderr

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("clipgen.training.callbacks.image_logger.load_clip", refuse)
    result = call("clipgen-train", *TRANSFORMER, *arguments, "output=alone")
    assert result.code == 0 and [path.name for path in Path("alone/grids").iterdir()] == names[:1], result.stderr


def test_clip_loss_loads_the_models_of_the_cache(call, encoded):
    arguments = ["data=cached", f"data.root={encoded}", "output=run", "model.clip_loss.weight=0.2"]
    result = call("clipgen-train", *TRANSFORMER, *arguments, "trainer.max_steps=2")
    assert result.code == 0, result.stderr


def test_cache_of_other_models_is_refused(call, encoded, tmp_path):
    torch.manual_seed(3)
    make_vqgan(**VQGAN_SIZES).save(tmp_path / "other")
    for argument, message in (
        ("vqgan=other", "another tokenizer than other"),
        ("clip=openai", "with the CLIP shapes, not with ViT"),
    ):
        result = call("clipgen-train", *TRANSFORMER, "data=cached", f"data.root={encoded}", argument, "output=run")
        assert result.code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a value for output, vqgan"),
        (["vqgan=none", "output=x"], "no VQGAN checkpoint: none does not exist"),
        (["vqgan=vqgan", "output=x", "no.key=1"], "there is no key no.key"),
    ],
)
def test_command_errors_are_one_line(call, tiny_vqgan, tmp_path, arguments, message):
    tiny_vqgan.save(tmp_path / "vqgan")
    result = call("clipgen-encode", *arguments)
    assert result.code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "x").exists()


def test_damaged_cache_is_refused(call, encoded, tmp_path):
    """Without its tokenizer or a shard, or with a truncated shard or manifest."""
    intact = contents(encoded)

    def cut(name: str, size: int) -> None:
        (encoded / name).write_bytes(intact[name][:size])

    for damage, message in (
        (lambda: shutil.rmtree(encoded / "vqgan"), "no VQGAN checkpoint"),
        (lambda: make_vqgan(**VQGAN_SIZES).save(encoded / "vqgan"), "another tokenizer than"),
        (
            lambda: (encoded / "train/shard-000001.npy").unlink(),
            "train must contain 64 images, as the manifest says, got 48",
        ),
        (lambda: cut("train/shard-000001.npy", 200), "shard-000001.npy is damaged"),
        (lambda: cut("train/shard-000001.npy", 0), "shard-000001.npy is damaged"),
        (lambda: cut("manifest.json", 40), "manifest.json is damaged"),
    ):
        damage()
        result = call("clipgen-train", *TRANSFORMER, "data=cached", f"data.root={encoded}", "output=run")
        assert result.code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
        for name, data in intact.items():
            (encoded / name).parent.mkdir(exist_ok=True)
            (encoded / name).write_bytes(data)


def test_changed_source_is_refused(call, tiny_vqgan, tmp_path):
    """Shards are numbered by the files of the source, so others would be mistaken for them."""
    tiny_vqgan.save(tmp_path / "vqgan")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(to_pil(ShapesDataset(10, seed=4).render(range(10)))):
        image.save(tmp_path / "images" / f"{index}.png")
    arguments = ["vqgan=vqgan", "data=folder", "data.root=images", "data.image_size=32", "shard_size=4", "device=cpu"]
    assert call("clipgen-encode", *arguments, "output=cache").code == 0
    assert call("clipgen-encode", *arguments, "output=cache").code == 0
    shutil.copy(tmp_path / "images/3.png", tmp_path / "images/00.png")
    result = call("clipgen-encode", *arguments, "output=cache")
    assert result.code == 1 and "cache contains results computed with files=" in result.stderr


def test_missing_cache_is_named(call):
    result = call("clipgen-train", *TRANSFORMER, "data=cached", "data.root=none", "output=run")
    assert result.code == 1 and "no token cache in none" in result.stderr and "clipgen-encode" in result.stderr


@pytest.mark.slow
def test_killed_encoding_resumes_to_identical_bytes(tmp_path, tiny_vqgan):
    """After SIGKILL at several moments."""
    import subprocess
    import sys

    tiny_vqgan.save(tmp_path / "vqgan")
    for index, image in enumerate(to_pil(ShapesDataset(40, seed=4).render(range(40)))):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{index:03d}.png")
    arguments = [
        "vqgan=vqgan",
        "data=folder",
        "data.root=images",
        "data.image_size=32",
        "shard_size=2",
        "device=cpu",
        "batch_size=1",
    ]
    done = command("clipgen-encode", *arguments, "output=straight", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program, kills = Path(sys.executable).parent / "clipgen-encode", 0
    for wait in (0.01, 0.05, 0.1, 0.2):
        with subprocess.Popen([program, *arguments, "output=killed"], cwd=tmp_path, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not list(tmp_path.glob("killed/train/*")):
                time.sleep(0.005)
            time.sleep(wait)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert kills and (tmp_path / "killed" / "manifest.json").is_file()
    done = command("clipgen-encode", *arguments, "output=killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = contents(tmp_path / "killed")
    assert resumed == contents(tmp_path / "straight")
    assert sum(json.loads(resumed["manifest.json"])["images"].values()) == 40


# -------------------------------------------------------------------------------------------------------------- labels


def labels_of(cache: Path, split: str = "train") -> list[int]:
    data = TokenCacheDataModule(cache, batch_size=1, conditioning="class")
    batch = getattr(data, split).batch(list(range(len(getattr(data, split)))))
    assert batch["condition"].dtype == torch.float32 and torch.equal(
        batch["condition"].sum(dim=1), torch.ones(len(batch["indices"]))
    )
    return batch["condition"].argmax(dim=1).tolist()


def test_cache_stores_the_classes_of_shapes(tmp_path, tiny_vqgan, shapes_clip, cache):
    data = shapes_data(train_size=50, val_size=10, image_size=32, batch_size=8, labels=True)
    assert precompute.write_token_cache(tmp_path / "labeled", data, tiny_vqgan, shapes_clip, {}, shard_size=16)
    expected = [ALL_ATTRIBUTES.index(attributes) for attributes in data.train.attributes]
    assert labels_of(tmp_path / "labeled") == expected
    manifest = read_manifest(tmp_path / "labeled")
    assert manifest["num_classes"] == 288 and manifest["class_names"][expected[7]] == data.train[7]["texts"]
    assert manifest["bytes_per_image"] == 16 * 2 + 64 * 2 + 4
    plain, labeled = (TokenCacheDataset(root / "train")[(0, 33)] for root in (cache, tmp_path / "labeled"))
    assert all(torch.equal(plain[name], labeled[name]) for name in plain)
    assert "num_classes" not in read_manifest(cache) and np.load(cache / "train/shard-000000.npy").dtype.names == (
        "indices",
        "embedding",
    )


def test_cache_stores_the_classes_of_tar_shards(tmp_path, tiny_vqgan, shapes_clip):
    """Of two shards, the first of which holds no usable image."""
    make_tar(tmp_path / "0.tar", {"0.png": b"broken", "0.cls": b"1"})
    make_tar(
        tmp_path / "1.tar",
        {"0.jpg": GOOD, "0.cls": b"4", "1.jpg": GOOD, "2.jpg": GOOD, "2.cls": b"-1", "3.jpg": GOOD, "3.cls": b"2"},
    )
    data = shard_data(f"{tmp_path}/*.tar", None, 32, batch_size=1, labels=True)
    assert precompute.write_token_cache(tmp_path / "cache", data, tiny_vqgan, shapes_clip, {}, augmentations=2)
    assert labels_of(tmp_path / "cache") == [4, 2]  # images without a class are skipped
    manifest = read_manifest(tmp_path / "cache")
    assert manifest["num_classes"] == 5 and class_names_of(manifest, "cache") == ["0", "1", "2", "3", "4"]

    (tmp_path / "names.json").write_text('["a", "b", "c", "d"]')
    named = shard_data(f"{tmp_path}/*.tar", None, 32, 1, labels=True, class_names=str(tmp_path / "names.json"))
    with pytest.raises(ValueError, match="must be below 4, the number of class names, got 4"):
        precompute.write_token_cache(tmp_path / "named", named, tiny_vqgan, shapes_clip, {})


def test_first_shard_may_be_empty(tmp_path, tiny_vqgan, shapes_clip):
    """It is written without the sizes of the others, which readers must not take from it."""
    make_tar(tmp_path / "0.tar", {"0.png": b"broken"})
    make_tar(tmp_path / "1.tar", {"0.jpg": GOOD, "1.jpg": GOOD})
    data = shard_data(f"{tmp_path}/*.tar", None, 32, batch_size=1)
    assert precompute.write_token_cache(tmp_path / "cache", data, tiny_vqgan, shapes_clip, {}, augmentations=2)
    dataset = TokenCacheDataset(tmp_path / "cache" / "train")
    assert len(dataset) == 2 and dataset[(1, 0)]["indices"].shape == (16,)
    assert dataset[1]["condition"].shape == (64,)


def test_cache_stores_the_classes_of_folders(tmp_path, tiny_vqgan, shapes_clip):
    for name in ("train/cat/a.png", "train/cat/deep/b.png", "train/ant/c.png", "val/cat/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    data = folder_data(tmp_path / "train", 32, 1, val_root=tmp_path / "val", labels=True)
    assert precompute.write_token_cache(tmp_path / "cache", data, tiny_vqgan, shapes_clip, {})
    assert labels_of(tmp_path / "cache") == [0, 1, 1] and labels_of(tmp_path / "cache", "val") == [1]  # sorted by path
    assert read_manifest(tmp_path / "cache")["class_names"] == ["ant", "cat"]
    with pytest.raises(ValueError, match=r"in a folder named after one of the training classes, got ant/c.png"):
        folder_data(tmp_path / "val", 32, 1, val_root=tmp_path / "train", labels=True)
    with pytest.raises(ValueError, match=r"in a folder named after its class, got a.png"):
        folder_data(tmp_path / "train" / "cat", 32, 1, val_fraction=0, labels=True)


def test_classes_of_a_cache_without_labels_are_refused(cache):
    with pytest.raises(ValueError, match=r"contains no labels; make one with `clipgen-encode data\.labels=true`"):
        TokenCacheDataModule(cache, batch_size=1, conditioning="class")
    with pytest.raises(ValueError, match="conditioning must be 'clip' or 'class', got 'text'"):
        TokenCacheDataModule(cache, batch_size=1, conditioning="text")


@pytest.mark.parametrize(("name", "text"), [("a.json", '["a cat", "a dog"]'), ("a.txt", "\ufeffa cat\n\n a dog \n")])
def test_class_names_are_read_from_json_and_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_names(tmp_path / name) == ["a cat", "a dog"]


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "[]", "[", ""])
def test_invalid_class_names_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json must contain a .*list of class names"):
        read_names(tmp_path / "a.json")

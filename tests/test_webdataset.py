"""Tar shards as streams of images."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import make_shards
import pytest
import torch
from conftest import SHARED
from image_data import BAD, GOOD, TRUNCATED, encoded, make_tar, needs_bad, numbered_tar, red, warnings_of
from PIL import Image
from torch.utils.data import DataLoader

from clipgen.data import shard_order
from clipgen.data import webdataset as shards_module
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.tar_reader import Member, Sample
from clipgen.data.urls import expand_urls
from clipgen.data.webdataset import ImageShards, estimate_images, shuffle_in_buffer

CIFAR10 = SHARED / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR10.exists(), reason=f"{CIFAR10} is absent; set CLIPGEN_SHARED")


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
    with pytest.raises(FileNotFoundError, match=r"^data\.val_urls must name existing shards, got none\.tar"):
        expand_urls("none.tar", "data.val_urls")
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


def test_consecutive_skips_are_reset_by_a_usable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_CONSECUTIVE_SKIPS", 3)
    make_tar(tmp_path / "a.tar", {"0.jpg": TRUNCATED, "1.jpg": TRUNCATED, "2.jpg": GOOD})
    assert len(list(islice(ImageShards(f"{tmp_path}/a.tar", 8, train=True, shuffle=0), 20))) == 20


def test_shuffle_buffer_is_bounded_in_bytes(monkeypatch):
    import random

    samples = [Sample("a.tar", f"{number}.png", bytes(10), None) for number in range(500)]
    plain = [sample.name for sample in shuffle_in_buffer(iter(samples), 200, random.Random(0))]
    assert sorted(plain) == sorted(sample.name for sample in samples) and plain != sorted(plain)
    monkeypatch.setattr(shards_module, "_SHUFFLE_BYTES", 100)
    taken: list[Sample] = []
    stream = shuffle_in_buffer((taken.append(sample) or sample for sample in samples), 200, random.Random(0))
    for number, _ in enumerate(stream, start=1):
        assert len(taken) - number <= 10
    assert number == 500


def test_images_in_shards_are_estimated_from_the_first(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_shards.main(["photos", "--output", "shards", "--shard-size", "10"])
    count = estimate_images(sorted(map(str, Path("shards").glob("train-*.tar"))))
    assert str(count) == "about 60 in 6 shards (estimated from the first)"
    assert estimate_images(["https://example.org/a.tar"]) is None

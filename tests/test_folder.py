"""Folders of images as a dataset, and their split."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from image_data import BAD, TRUNCATED, UNUSABLE, USABLE, make_folder, needs_bad, red, square
from torch.utils.data import DataLoader

from clipgen.data import folder as folder_module
from clipgen.data.folder import ImageFolder, folder_data, split_files

SUMMARY = "18 images, 4 skipped: 1 truncated, 1 empty, 1 not an image, 1 too large"


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


def test_headers_are_checked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [*ImageFolder(make_folder(tmp_path, 9, bad=(0, 3, 8)), 8, train=True).files]
    monkeypatch.setattr(folder_module, "_FILES_PER_BLOCK", 2)
    assert [*ImageFolder(tmp_path, 8, train=True).files] == expected and len(expected) == 6


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
    with pytest.raises(ValueError, match=r"^data\.val_fraction must be in \[0, 1\), got 1.5"):
        split_files(["a", "b"], 1.5)
    with pytest.raises(ValueError, match=r"^data\.val_fraction must be 0 for fewer than two usable images, got 0.1"):
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


def test_numeric_class_names_are_sorted_by_value(tmp_path):
    for name in ("0", "1", "2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(square(1))
    assert ImageFolder(tmp_path, 8, train=True, labels=True).class_names == ["0", "1", "2", "10"]

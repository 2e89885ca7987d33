"""The files that are found below a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_data import make_folder

from clipgen.data import folder_listing
from clipgen.data.folder import ImageFolder
from clipgen.data.folder_listing import check_holds_images, find_images


def test_folders_without_images_are_refused_and_links_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must contain \.jpg.* got 1 files of other types"):
        check_holds_images(tmp_path)
    make_folder(tmp_path / "elsewhere", 1)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    check_holds_images(tmp_path / "a")


def test_errors_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must contain \.jpg.* got no files$"):
        check_holds_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^data\.val_root must be an existing folder of images, got .*none"):
        check_holds_images(tmp_path / "none", "data.val_root")


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


def test_folder_of_very_many_files_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, 4)
    for limit, num_warnings in ((5, 0), (4, 1), (2, 1)):
        monkeypatch.setattr(folder_listing, "_MANY_FILES", limit)
        caplog.clear()
        ImageFolder(tmp_path, 8, train=True)
        assert len([r for r in caplog.records if "tar shards start faster" in r.message]) == num_warnings

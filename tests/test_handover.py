"""One process reads headers and lists files at the start, and the others receive the result."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from image_data import is_mapped
from PIL import Image

from clipgen.data import folder, handover, packed_strings
from clipgen.data.folder import ImageFolder
from clipgen.data.handover import compute_on_rank_zero, from_rank_zero, share_results_in_files
from clipgen.data.packed_strings import PackedStrings


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "4.png").touch()
    return tmp_path / "images"


def test_processes_that_are_started_later_do_not_scan_again(images, monkeypatch):
    with share_results_in_files():
        with compute_on_rank_zero():
            first = ImageFolder(images, 8, train=True)
        monkeypatch.setattr(folder, "scan_folder", None)
        with compute_on_rank_zero():
            second = ImageFolder(images, 8, train=True)
    assert [*first.files] == [*second.files] and len(second) == 4
    assert first.skip_counter.num_used == second.skip_counter.num_used == 4
    assert first.skip_counter.num_skipped == 1


def test_arrays_are_mapped_by_the_processes_that_receive_them(images, monkeypatch):
    """The names of millions of files are not copied into every process."""
    monkeypatch.setattr(packed_strings, "MAX_BYTES_IN_MEMORY", 1)
    with share_results_in_files():
        for _ in range(2):
            with compute_on_rank_zero():
                names, empty = from_rank_zero(lambda: (PackedStrings(["a", "b"]), PackedStrings([])))
        assert is_mapped(names.content) and is_mapped(names.ends)
    assert [*names] == ["a", "b"] and not empty


def test_files_that_windows_does_not_remove_are_no_error(tmp_path, monkeypatch):
    """Windows does not remove files that are mapped."""

    def refuse(*arguments, **options):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, share_results_in_files():
        with compute_on_rank_zero():
            from_rank_zero(lambda: 1)
        patch.setattr(os, "unlink", refuse)
    assert handover.FOLDER_VARIABLE not in os.environ


def test_without_a_training_every_process_works():
    calls = []
    with share_results_in_files():
        for _ in range(2):
            from_rank_zero(lambda: calls.append(1))
    assert len(calls) == 2


def connected(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    with compute_on_rank_zero():
        assert from_rank_zero(lambda: {"rank": rank}) == {"rank": 0}
        with pytest.raises(ValueError, match="raised by rank 0"):
            from_rank_zero(lambda: int(f"raised by rank {rank}"))
        # arrays are sent in blocks
        handover.BLOCK_BYTES = 5
        packed_strings.MAX_BYTES_IN_MEMORY = 1
        names = from_rank_zero(lambda: PackedStrings([f"{number} of rank {rank}" for number in range(50)]))
        assert [*names] == [f"{number} of rank 0" for number in range(50)] and is_mapped(names.content)
    assert from_rank_zero(lambda: rank) == rank
    dist.destroy_process_group()


@pytest.mark.slow
def test_connected_processes_receive_the_result_of_the_first(tmp_path):
    mp.spawn(connected, (str(tmp_path),), nprocs=2)

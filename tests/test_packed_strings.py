"""Many strings in little memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import pytest
from image_data import GOOD, is_mapped

from clipgen.data import packed_strings
from clipgen.data.folder import ImageFolder, split_files
from clipgen.data.packed_strings import PackedStrings


def test_packed_strings_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_strings, "MAX_BYTES_IN_MEMORY", 1)
    tracemalloc.start()
    names = PackedStrings(f"{number:030d}.jpg" for number in range(20_000))
    train, val = split_files(names, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a list of these strings takes 91 bytes per name; the split needs a number per name
    assert len(train) + len(val) == len(names) and peak < 20 * len(names)


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

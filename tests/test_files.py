"""Names of files, and the processes that write them."""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from clipgen.storage import files
from clipgen.storage.files import atomic_write, is_running, natural_key, write_json

RUNNING, ENDED, OF_ANOTHER_USER, NONE = 8, 12, 16, 20


class Kernel32:
    """The part of the Windows API that knows processes; the handle of a process is its id."""

    def __init__(self) -> None:
        self.error = 0
        self.open: list[int] = []

    def OpenProcess(self, access: int, inherit: bool, pid: int) -> int:
        assert access == 0x100000 and not inherit
        if pid not in (RUNNING, ENDED):
            self.error = 5 if pid == OF_ANOTHER_USER else 87
            return 0
        self.open.append(pid)
        return pid

    def WaitForSingleObject(self, handle: int, milliseconds: int) -> int:
        assert handle in self.open and milliseconds == 0
        return 0x102 if handle == RUNNING else 0

    def CloseHandle(self, handle: int) -> None:
        self.open.remove(handle)


@pytest.fixture
def kernel32(monkeypatch) -> Kernel32:
    """Imitate Windows with a few processes."""
    library = Kernel32()
    monkeypatch.setattr(files, "IS_WINDOWS", True)
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: library, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: library.error, raising=False)
    return library


def test_natural_key_sorts_numbers_by_value():
    ordered = ["0.png", "1.png", "2.png", "9.png", "010.png", "11.png", "a/2/1.png", "a/10/1.png", "b_2_3", "b_2_12"]
    assert sorted(sorted(ordered), key=natural_key) == ordered
    assert natural_key("9" * 5000) > natural_key("8" * 5000) > natural_key("9" * 4999)


@pytest.mark.parametrize("pid", [RUNNING, ENDED, OF_ANOTHER_USER, NONE, -1, 2**32])
def test_processes_are_looked_up_on_windows(kernel32, pid):
    assert is_running(pid) == (pid in (RUNNING, OF_ANOTHER_USER)) and not kernel32.open


def test_partial_files_of_killed_processes_are_removed_on_windows(kernel32, tmp_path):
    kept = f".a.json.{files.host_name()}.{RUNNING}.partial"
    for name in (kept, f".a.json.{files.host_name()}.{ENDED}.partial"):
        (tmp_path / name).touch()
    write_json(tmp_path / "a.json", {})
    assert {*os.listdir(tmp_path)} == {"a.json", kept}


@pytest.mark.parametrize(("refusals", "content"), [(2, "new"), (3, "old")])
def test_file_that_windows_refuses_to_replace_is_replaced_at_a_later_attempt(monkeypatch, tmp_path, refusals, content):
    """Windows refuses it while another process has the file open."""
    monkeypatch.setattr(files, "ATTEMPTS", 3)
    monkeypatch.setattr(files, "ATTEMPT_INTERVAL", 0)
    (tmp_path / "a").write_text("old")
    errors = [PermissionError(13, "Access is denied")] * refusals
    replace = Path.replace

    def replace_if_closed(self: Path, target: Path) -> Path:
        if errors:
            raise errors.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_if_closed)
    refused = nullcontext() if content == "new" else pytest.raises(PermissionError, match="Access is denied")
    with refused, atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    assert (tmp_path / "a").read_text() == content and os.listdir(tmp_path) == ["a"]

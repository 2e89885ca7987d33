"""Lock files: one process at a time writes to a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clipgen.storage import files, run_lock
from clipgen.storage.run_lock import LOCK, hold_lock


def test_processes_with_different_ranks_share_a_folder(tmp_path):
    with hold_lock(tmp_path, f"{LOCK}-0"), hold_lock(tmp_path, f"{LOCK}-1"):
        assert {path.name for path in tmp_path.iterdir()} == {f"{LOCK}-0", f"{LOCK}-1"}


def test_only_one_of_many_threads_gets_the_lock(tmp_path):
    """Even if all of them find the lock of a dead process first."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = {
        "pid": dead.pid,
        "started": "1",
        "process_table": run_lock.process_table(),
        "host": "here",
        "since": "now",
    }
    for _ in range(20):
        (tmp_path / LOCK).write_text(json.dumps(record))
        inside, most, lock = [0], [0], threading.Lock()

        def work(inside=inside, most=most, lock=lock) -> None:
            try:
                with hold_lock(tmp_path):
                    with lock:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.01)
                    with lock:
                        inside[0] -= 1
            except FileExistsError:
                pass

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] and not list(tmp_path.iterdir())


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom clipgen.storage.run_lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(FileExistsError, match=f"process {process.pid} on"), hold_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("place", ["another machine", "this machine, without a start time"])
def test_lock_whose_holder_cannot_be_looked_up_is_respected_while_it_is_updated(tmp_path, monkeypatch, place, lives):
    """The id of a process that has ended may be that of a later one."""
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.5)
    monkeypatch.setattr(run_lock, "start_time", lambda pid: "")
    table = "elsewhere" if place == "another machine" else run_lock.process_table()
    pid = os.getppid()
    record = {"pid": pid, "started": "", "process_table": table, "host": "far", "since": "now"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    done = threading.Event()
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.05)
    thread = threading.Thread(target=run_lock.renew_lock, args=(tmp_path / LOCK, done))
    if lives:
        thread.start()
        with pytest.raises(FileExistsError, match=f"process {pid} on far since now"), hold_lock(tmp_path):
            pass
        done.set()
        thread.join()
    else:
        with hold_lock(tmp_path):
            pass


def test_lock_that_another_process_reads_is_released_on_windows(tmp_path, monkeypatch):
    """Windows does not remove a file that another process has open."""
    monkeypatch.setattr(files, "ATTEMPTS", 3)
    monkeypatch.setattr(files, "ATTEMPT_INTERVAL", 0)
    unlink = Path.unlink
    refusals = 2

    def unlink_if_closed(self: Path, missing_ok: bool = False) -> None:
        nonlocal refusals
        if self.name == LOCK and refusals:
            refusals -= 1
            raise PermissionError(13, "Access is denied")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_if_closed)
    with hold_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    refusals = 9
    with hold_lock(tmp_path):
        pass
    # It does not fail, and the next process takes over the lock of a dead one.
    assert (tmp_path / LOCK).exists()


def test_damaged_lock_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.1)
    (tmp_path / LOCK).write_text("{")
    with hold_lock(tmp_path):
        pass

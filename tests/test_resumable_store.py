"""The resumable store: one identity, parts that are computed once, and processes that share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgen.storage.resumable_store import ResumableStore


@pytest.fixture
def store(tmp_path) -> ResumableStore:
    return ResumableStore(tmp_path / "store", "identity.json", result_keys=("images",))


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def parts_of(store: ResumableStore) -> dict[Path, str]:
    return {store.folder / f"{name}.txt": name for name in "abcde"}


def test_another_identity_is_refused_and_the_difference_is_named(store):
    store.open({"model": "first", "size": 3})
    store.open({"model": "first", "size": 3})
    with pytest.raises(ValueError, match="contains results computed with model=first, not second; choose another"):
        store.open({"model": "second", "size": 3})
    with pytest.raises(ValueError, match="contains results computed with seed=None, not 7"):
        store.open({"model": "first", "size": 3, "seed": 7})
    with pytest.raises(ValueError, match="contains results computed with size=3, not None"):
        store.open({"model": "first"})


def test_identities_are_compared_as_json(store):
    store.open({"radii": (0, 1)})
    store.open({"radii": [0, 1]})


def test_results_are_not_part_of_the_identity(store):
    store.open({"model": "first"})
    store.add_results({"model": "first"}, {"images": 5})
    assert store.read_identity() == {"model": "first", "images": 5}
    store.open({"model": "first"})


def test_other_files_are_prepared_before_the_identity_is_written(store):
    def fail() -> None:
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        store.open({"model": "first"}, prepare=fail)
    assert not store.identity_path.exists()
    calls = []
    store.open({"model": "first"}, prepare=lambda: calls.append(store.identity_path.exists()))
    store.open({"model": "first"}, prepare=lambda: calls.append(None))
    assert calls == [False]


def test_a_process_that_loses_the_race_to_create_a_store_opens_it(store, monkeypatch):
    monkeypatch.setattr("clipgen.storage.resumable_store.time.sleep", lambda seconds: None)

    def overtaken() -> None:
        if not store.identity_path.exists():
            ResumableStore(store.folder, "identity.json").open({"model": "first"})
            raise FileExistsError(17, "File exists", str(store.folder))

    store.open({"model": "first"}, prepare=overtaken)
    assert store.read_identity() == {"model": "first"}


def test_errors_other_than_a_race_are_raised_at_once(store):
    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.open({"model": "first"}, prepare=full_disk)


def test_an_interrupted_computation_resumes_without_computing_parts_again(store):
    store.open({})
    parts = parts_of(store)
    computed: list[str] = []

    def write(path: Path, text: str) -> None:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(text)
        write_text(path, text)

    with pytest.raises(KeyboardInterrupt):
        store.write_missing(parts, write)
    assert computed == ["a", "b"] and not store.is_complete(parts)
    existing: list[str] = []
    rest: list[str] = []
    store.write_missing(
        parts,
        lambda path, text: (rest.append(text), write_text(path, text))[0],
        on_existing=lambda path: existing.append(path.stem),
    )
    assert existing == ["a", "b"] and rest == ["c", "d", "e"] and store.is_complete(parts)


def test_ranks_share_the_parts(store):
    store.open({})
    parts = parts_of(store)
    store.write_missing(parts, write_text, rank=1, world_size=2)
    assert sorted(path.stem for path in store.folder.glob("*.txt")) == ["b", "d"] and not store.is_complete(parts)
    store.write_missing(parts, write_text, rank=0, world_size=2)
    assert store.is_complete(parts)

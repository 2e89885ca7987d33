"""scripts/make_shards.py: write a folder or a torchvision dataset as tar shards."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tarfile
from pathlib import Path

import make_shards
import numpy as np
import pytest
import torchvision
from conftest import SHARED
from PIL import Image

from clipgen.data.folder import folder_data
from clipgen.data.webdataset import ImageShards
from clipgen.storage.run_lock import hold_lock

BAD = SHARED / "data" / "bad_images"


def run(*arguments: object) -> None:
    make_shards.main([str(argument) for argument in arguments])


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(12):
        path = tmp_path / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i * 20, 0, 0)).save(path)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"")
    return tmp_path / "photos"


class Digits:
    """Imitation of a torchvision dataset with two splits; its images are gray, as in MNIST."""

    classes = ("zero", "one", "two")

    def __init__(self, root: Path, train: bool = True, transform: object = None, download: bool = False) -> None:
        assert download
        self.size = 7 if train else 3

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= self.size:
            raise IndexError
        return Image.new("L", (8, 8), index * 30), index % 3


def test_folder_becomes_numbered_shards_with_a_split(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(photos, "--output", tmp_path / "out", "--shard-size", 4, "--val-fraction", 0.25)
    data = folder_data(photos, 8, batch_size=1, val_fraction=0.25)
    train = sorted(path for path in names(tmp_path / "out") if path.startswith("train"))
    files = [name for shard in train for name in contents(tmp_path / "out" / shard)]
    assert files == [f"{i:08d}.jpg" for i in range(len(data.train))]
    assert [len(contents(tmp_path / "out" / shard)) for shard in train[:-1]] == [4] * (len(train) - 1)
    assert len(contents(tmp_path / "out" / "val-000000.tar")) == len(data.val)
    assert sum("broken.jpg: empty" in m for m in caplog.messages) == 2  # once here, once in folder_data
    assert f"{photos}: 12 images, 1 skipped: 1 empty" in caplog.messages


def test_split_equals_that_of_data_folder_and_the_order_is_random(photos: Path, tmp_path: Path) -> None:
    run(photos, "--output", tmp_path / "out", "--val-fraction", 0.25)

    def reds(dataset: object) -> list[int]:
        return [round((float(sample["images"][0].mean()) + 1) * 127.5 / 20) for sample in dataset]

    data = folder_data(photos, 8, batch_size=1, val_fraction=0.25, flip=False)
    train = reds(ImageShards(f"{tmp_path}/out/train-*.tar", 8, train=False))
    assert sorted(train) == sorted(reds(data.train)) and train != sorted(train)
    assert sorted(reds(ImageShards(f"{tmp_path}/out/val-*.tar", 8, train=False))) == sorted(reds(data.val))


def test_same_input_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        run(photos, "--output", tmp_path / out, "--shard-size", 5)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_existing_shards_are_not_overwritten(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000007.tar").write_bytes(b"precious")
    with pytest.raises(SystemExit, match=r"without shards, got .*out with train-000007.tar"):
        run(photos, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == ["train-000007.tar"]


def test_folder_that_another_process_writes_to_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold_lock(tmp_path / "out"), pytest.raises(SystemExit, match="make_shards: output must not be in use"):
        run(photos, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_failed_run_leaves_no_files(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        assert any((tmp_path / "out").glob(".unfinished-*/train-*.tar"))
        raise OSError("disk full")

    monkeypatch.setattr(make_shards.logger, "info", fail)
    with pytest.raises(SystemExit, match=r"^make_shards: disk full$"):
        run(photos, "--output", tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_images_are_resized_and_stripped_of_metadata(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "camera"
    Image.fromarray(noise).save(tmp_path / "in" / "big.jpg", exif=exif, comment=b"secret")
    Image.new("RGB", (10, 20)).save(tmp_path / "in" / "small.png")
    sizes = {}
    for quality in (50, 95):
        out = tmp_path / str(quality)
        run(tmp_path / "in", "--output", out, "--image-size", 30, "--quality", quality, "--val-fraction", 0)
        assert names(out) == ["train-000000.tar"]
        jpegs = contents(out / "train-000000.tar").values()
        images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
        assert sorted(image.size for image in images) == [(10, 20), (45, 30)]
        assert not any(b"camera" in jpeg or b"secret" in jpeg for jpeg in jpegs)
        sizes[quality] = sum(map(len, jpegs))
    assert sizes[50] < sizes[95]


def test_torchvision_dataset_keeps_splits_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "Digits", Digits, raising=False)
    run("Digits", "--output", tmp_path / "out", "--shard-size", 4, "--root", tmp_path / "download")
    out = tmp_path / "out"
    assert names(out) == ["classes.json", "train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert json.loads((out / "classes.json").read_text()) == list(Digits.classes)
    samples = list(ImageShards(f"{out}/train-*.tar", 8, train=False, labels=True))
    values = [round((float(sample["images"].mean()) + 1) * 127.5 / 30) for sample in samples]
    assert sorted(values) == list(range(7)) and values != sorted(values)
    assert [sample["label"] for sample in samples] == [value % 3 for value in values]
    assert len(contents(out / "val-000000.tar")) == 6


def test_torchvision_dataset_without_a_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(torchvision.datasets.FakeData):
        def __init__(self, size: int = 5, image_size: tuple[int, int, int] = (3, 8, 8)) -> None:
            super().__init__(size, image_size)

    monkeypatch.setattr(torchvision.datasets, "FakeData", Few)
    run("FakeData", "--output", tmp_path / "out")
    assert names(tmp_path / "out") == ["train-000000.tar"]
    assert len(contents(tmp_path / "out" / "train-000000.tar")) == 10


@pytest.mark.parametrize("source", ["Nope", "/no/such/folder", "__name__"])
def test_unknown_source_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^make_shards: SOURCE must be an existing folder or .*, got {source}$"):
        run(source, "--output", tmp_path / "out")


@pytest.mark.parametrize("arguments", [[], ["/none", "--output", "s"]], ids=["no arguments", "no folder"])
def test_early_errors_do_not_import_torch(arguments: list[str], tmp_path: Path) -> None:
    folder = str(Path(make_shards.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import make_shards\n" + (
        f"try: make_shards.main({arguments})\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "False\n" and done.returncode and "Traceback" not in done.stderr, done


def test_folder_without_usable_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^make_shards: .*in must contain a usable image, got 0 images, 1 skipped"):
        run(tmp_path / "in", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    with pytest.raises(SystemExit, match=r"^make_shards: --val-fraction must be 0 for fewer than two usable images"):
        run(tmp_path / "in", "--output", tmp_path / "out")


@pytest.mark.parametrize("option", [("--quality", 0), ("--shard-size", 0), ("--val-fraction", 1), ("--image-size", 0)])
def test_option_ranges_are_checked(option: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--output", tmp_path / "out", *option)
    assert f"{option[0]} must be" in capsys.readouterr().err


@pytest.mark.skipif(not BAD.exists(), reason=f"{BAD} is absent; set CLIPGEN_SHARED")
def test_folder_of_bad_images_keeps_the_usable_ones(tmp_path: Path) -> None:
    run(BAD, "--output", tmp_path / "out", "--val-fraction", 0.2)
    files = [name for shard in names(tmp_path / "out") for name in contents(tmp_path / "out" / shard)]
    assert len(files) == 18

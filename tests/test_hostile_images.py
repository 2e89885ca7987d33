"""Untrusted images, folders and shards do not hang, exhaust memory, start programs or disappear uncounted."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import ESCAPE, PROMPT
from image_data import square, warnings_of
from PIL import Image, ImageCms

from clipgen.cli.sample_request import read_image
from clipgen.data import color_conversion
from clipgen.data import decoding as images_module
from clipgen.data import tar_reader as tar_module
from clipgen.data import webdataset as shards_module
from clipgen.data.decoding import MAX_PIXELS, UnusableImageError, check_header, decode_image
from clipgen.data.folder import ImageFolder
from clipgen.data.folder_listing import find_images
from clipgen.data.memory_budget import MemoryBudget
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.captions import embedded_caption
from clipgen.evaluation.sources import FolderImages


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blank_png(width: int, height: int, color_type: int = 0, rows: int | None = None) -> bytes:
    """Make a PNG of zeros, which takes a thousand times the size of the file in memory."""
    channels = {0: 1, 2: 3, 6: 4}[color_type]
    packer, row = zlib.compressobj(9), bytes(1 + channels * width)
    data = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reds(dataset: ImageShards) -> list[int]:
    """Return the red values by which images are recognized."""
    return [round((float(sample["images"][0].mean()) + 1) * 127.5) for sample in dataset]


# ------------------------------------------------------------------------------------------------------------- memory


def peak_of(program: str, *arguments: object) -> tuple[int, str]:
    """Run Python code in a new process; return by how many megabytes its peak memory grew, and its output."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport clipgen.data.folder, clipgen.data.webdataset\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        f"before = peak()\n{program}\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes only on Linux")
def test_large_images_are_not_decoded_at_the_same_time(tmp_path):
    """Each thread would need 440 MB for a file of 90 kB."""
    (tmp_path / "a.png").write_bytes(blank_png(9400, 9400))
    program = (
        "from multiprocessing.pool import ThreadPool\nfrom clipgen.data.decoding import check_header, decode_image\n"
        "pool = ThreadPool(4)\npool.map(lambda i: decode_image(Path(sys.argv[1])) and None, range(4), chunksize=1)"
    )
    grown, _ = peak_of(program, tmp_path / "a.png")
    assert grown < 700


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes only on Linux")
def test_large_transparent_image_is_converted_in_bands(tmp_path):
    (tmp_path / "a.png").write_bytes(blank_png(5000, 5000, color_type=6))
    grown, _ = peak_of(
        "from clipgen.data.decoding import decode_image\ndecode_image(Path(sys.argv[1]))", tmp_path / "a.png"
    )
    assert grown < 25 * 8 + 100


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "F"])
def test_conversion_in_bands_changes_no_pixel(mode, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    image = Image.fromarray(noise[..., 0].astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    expected = color_conversion.to_rgb(image)
    monkeypatch.setattr(color_conversion, "_BAND_PIXELS", 100)
    assert np.array_equal(expected, color_conversion.to_rgb(image)) and expected.mode == "RGB"


def test_images_above_the_size_limit_are_refused_by_their_header():
    """Pillow's own limit is 179 megapixels, which take 700 MB."""
    side = int(MAX_PIXELS**0.5) + 1
    bomb = blank_png(side, side, rows=1)
    for check in (check_header, decode_image):
        with pytest.raises(UnusableImageError, match=f"{side} x {side} pixels are .* above {MAX_PIXELS}") as caught:
            check(bomb)
        assert caught.value.reason == "too large"


def test_size_limit_of_a_jpeg_applies_to_the_decoded_size(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 10_000)
    photo = encoded(Image.new("RGB", (640, 480)), "JPEG")
    check_header(photo)
    assert decode_image(photo, image_size=16).size == (80, 60)
    with pytest.raises(UnusableImageError, match="too large"):
        decode_image(photo)


@pytest.mark.parametrize("options", [{"progressive": True}, {}])
def test_size_limit_of_a_jpeg_of_several_scans_applies_to_its_full_size(options):
    """libjpeg keeps the coefficients of the full size, also if a smaller image is decoded."""
    content = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG", **options))
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    content[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    if not options:
        # the first scan holds one of the three components
        scan = content.find(b"\xff\xda")
        content[scan : scan + 14] = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    for check in (lambda: decode_image(bytes(content), 32), lambda: check_header(bytes(content))):
        with pytest.raises(UnusableImageError, match="too large"):
            check()


def test_memory_budget_grants_a_large_request_alone():
    budget, most, running = MemoryBudget(100), [], []

    def work(size: int) -> None:
        with budget.reserved(size):
            running.append(size)
            most.append(sum(running))
            time.sleep(0.005)
            running.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in [40, 40, 40, 500] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(most) == 20 and budget.held == 0
    assert all(total == 500 or total <= 100 for total in most)


# ------------------------------------------------------------------------------------------------------------ formats


def test_postscript_does_not_start_a_program(tmp_path, monkeypatch, call):
    """Whether the image is a prompt, is to be reproduced, or is searched for its caption."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    result = call("clipgen-sample", "--reproduce", "eps.png")
    assert result.code == 1 and "eps.png is not an image of clipgen-sample" in result.stderr
    result = call("clipgen-sample", "--image", "eps.png")
    assert result.code == 1 and "eps.png cannot be used as an image: not an image" in result.stderr
    with pytest.raises(ValueError, match=r"neither .*eps\.png nor a eps\.txt"):
        embedded_caption(tmp_path / "eps.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("HEIC", b"\0\0\0\x18ftypheic"),
        ("AVIF", b"\0\0\0\x18ftypavif"),
        ("JPEG XL", b"\xff\x0a"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n"),
    ],
)
def test_missing_decoder_is_named(name, start, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(images_module, "_formats", lambda: images_module._FORMATS)
    with pytest.raises(UnusableImageError, match=rf"no decoder \({name}: "):
        decode_image(start + bytes(40))
    (tmp_path / "a.jpg").write_bytes(start + bytes(40))
    (tmp_path / "b.png").write_bytes(square(3))
    assert str(ImageFolder(tmp_path, 8, train=True).skip_counter) == "1 image, 1 skipped: 1 no decoder"
    assert f"a.jpg: no decoder ({name}: " in caplog.text


def test_unusual_and_missing_extensions_are_used(tmp_path, caplog):
    names = ["a.jfif", "b.jpe", "c.JPG", "d", "clip.0001", "sub/e.jpg?size=2"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(square(9, "JPEG"))
    if images_module.features.check("avif"):
        names.append("f.avif")
        (tmp_path / "f.avif").write_bytes(square(9, "AVIF"))
        (tmp_path / "g.jpg").write_bytes(square(9, "AVIF"))
        names.append("g.jpg")
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "notes.txt").write_bytes(square(9))
    (tmp_path / "h.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(9))
    dataset = ImageFolder(tmp_path, 8, train=True)
    assert sorted(dataset.files) == sorted(names)
    assert str(dataset.skip_counter).endswith("2 skipped: 1 not an image, 1 no decoder")
    assert "LICENSE: not an image (the name has no extension)" in caplog.text


def test_files_of_other_types_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("a.png", "b.ppm", "c.PPM", "d.txt", ".hidden.ppm"):
        (tmp_path / name).write_bytes(square(9))
    ImageFolder(tmp_path, 8, train=True)
    assert f"{tmp_path}: files of other types are not used: 2 .ppm, 1 .txt" in caplog.text
    members = [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    caplog.clear()
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", members)), 8, train=False)
    assert reds(dataset) == reds(dataset) == [9]
    logged = [record.getMessage() for record in caplog.records if "are not used" in record.getMessage()]
    assert logged == [f"{tmp_path / 'a.tar'}: {extension} files are not used" for extension in (".ppm", ".txt")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipe_does_not_block(tmp_path, call):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").write_bytes(square(1))
    dataset = ImageFolder(tmp_path, 8, train=True)
    assert list(dataset.files) == ["a.png"] and "1 unreadable" in str(dataset.skip_counter)
    for option in ("--reproduce", "--image", "--outpaint"):
        result = call("clipgen-sample", "--prompt", PROMPT, option, "pipe.png")
        assert result.code == 1 and "there is no image pipe.png" in result.stderr


# ----------------------------------------------------------------------------------------------------- color profiles


def adobe_rgb() -> bytes:
    """Make the profile of Adobe RGB (1998) from its primaries and its exponent."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"A\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.95045, 1, 1.08905),
        b"rXYZ": b"XYZ " + bytes(4) + fixed(0.60974, 0.31111, 0.01947),
        b"gXYZ": b"XYZ " + bytes(4) + fixed(0.20528, 0.62567, 0.06087),
        b"bXYZ": b"XYZ " + bytes(4) + fixed(0.14919, 0.06322, 0.74457),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = struct.pack(">I", start + len(body))
    header = size + b"none\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_adobe_rgb_becomes_srgb(kind):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    photo = encoded(Image.new("RGB", (16, 16), (200, 60, 60)), kind, icc_profile=adobe_rgb(), **options)
    decoded = decode_image(photo)
    assert np.abs(np.subtract(decoded.getpixel((8, 8)), (231, 57, 57))).max() <= 1
    assert "icc_profile" not in decoded.info  # it must not be applied again


def test_profiles_apply_to_transparent_and_palette_images():
    image = Image.new("RGBA", (4, 4), (200, 60, 60, 255))
    image.putpixel((0, 0), (200, 60, 60, 0))
    decoded = decode_image(encoded(image, icc_profile=adobe_rgb()))
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((2, 2)) == (231, 57, 57)
    palette = image.convert("RGB").quantize(4)
    assert decode_image(encoded(palette, icc_profile=adobe_rgb())).getpixel((2, 2)) == (231, 57, 57)


def test_srgb_and_broken_profiles_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for profile in (srgb, b"no profile", adobe_rgb()[:200], bytes(5 << 20)):
        tiff = encoded(Image.fromarray(pixels), "TIFF", icc_profile=profile)
        assert np.array_equal(decode_image(tiff), pixels)
    gray = encoded(Image.new("L", (4, 4), 60), icc_profile=srgb)
    assert decode_image(gray).getpixel((0, 0)) == (60, 60, 60)


# -------------------------------------------------------------------------------------------------------------- shards


def test_numbered_names_with_dots_are_separate_samples(tmp_path):
    files = [(f"clip.{number:04d}.png", square(number)) for number in range(12)]
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", files)), 8, train=False)
    assert reds(dataset) == list(range(12)) and str(dataset.skip_counter) == "12 images, 0 skipped"


def test_more_numbered_names_than_fit_into_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "_MAX_GROUP_FILES", 8)
    files = [
        (f"clip.{n:04d}.{kind}", square(n) if kind == "png" else str(n).encode())
        for n in range(50)
        for kind in ("cls", "png")
    ]
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", files)), 8, train=False, labels=True)
    assert [sample["label"] for sample in dataset] == list(range(50)) == reds(dataset)


def test_labels_of_names_with_dots(tmp_path):
    files = [
        ("clip.0001.cls", b"1"),
        ("clip.0001.png", square(1)),
        ("clip.0002.png", square(2)),
        ("clip.0002.cls", b"2"),
        ("a.b/photo.v1.png", square(3)),
        ("a.b/photo.cls", b"3"),
        ("x.png", square(4)),
    ]
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", files)), 8, train=False, labels=True)
    assert [sample["label"] for sample in dataset] == [1, 2, 3] == reds(dataset)
    assert str(dataset.skip_counter) == "3 images, 1 skipped: 1 without label"


def test_images_with_the_same_name_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = [
        ("0.png", square(1)),
        ("0.jpg", square(2)),
        ("1.png", square(3)),
        ("1.png", square(4)),
        ("2.png", square(5)),
        ("2.seg.png", square(6)),
        ("2.2.png", square(7)),
        ("3.left.png", square(8)),
        ("3.right.png", square(9)),
    ]
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", files)), 8, train=False)
    assert reds(dataset) == [1, 3, 5, 7, 8, 9]
    assert str(dataset.skip_counter) == "6 images, 2 skipped: 2 same name"
    assert (
        "0.jpg: same name (0.png is used)" in caplog.text and "1.png: same name (the name occurs twice)" in caplog.text
    )
    assert "2.seg.png is not used: it belongs to the sample of 2.png" in caplog.text
    assert "1 further images belong to the samples of these" in caplog.text and "broken" not in caplog.text


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "names",
    [
        [f"{kind}/{number:04d}.png" for kind in ("cat", "dog", "ship", "frog") for number in range(5)],
        [f"clip.{number:04d}.png" for number in range(12)],
        ["0.png", "0.jpg", "2.png", "2.seg.png", "2.2.png", "3.left.png", "3.right.png", ".hidden.png", "4"],
    ],
)
def test_estimated_number_of_images_is_that_of_the_samples(names, mode, tmp_path):
    path = make_tar(tmp_path / "a.tar", [(name, square(number)) for number, name in enumerate(names)], mode)
    dataset = ImageShards(str(path), 8, train=False)
    assert dataset.count_images().images == len(reds(dataset))


def test_members_without_extension_and_links_are_used_or_counted(tmp_path):
    path = make_tar(
        tmp_path / "a.tar", [("0001", square(1)), ("LICENSE", b"text"), ("b.png", square(2)), ("c.txt", b"")]
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.LNKTYPE, "b.png"
        tar.addfile(link)
    dataset = ImageShards(str(path), 8, train=False)
    assert reds(dataset) == [1, 2] and str(dataset.skip_counter) == "2 images, 2 skipped: 1 not an image, 1 unreadable"


@pytest.mark.parametrize("kind", ["plain", "gz", "sparse"])
def test_too_large_member_is_refused_before_reading(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 100_000)
    path = tmp_path / "a.tar"
    if kind == "sparse":
        with tarfile.open(path, "w") as tar:
            for name, data in (("0.png", square(1)), ("1.png", square(2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                if name == "0.png":
                    old_gnu_sparse(tar, "bomb.png", 1 << 32)
    else:
        mode = "w:gz" if kind == "gz" else "w"
        make_tar(path, [("0.png", square(1)), ("bomb.png", bytes(200_000)), ("1.png", square(2))], mode)
    dataset = ImageShards(str(path), 8, train=False)
    assert reds(dataset) == [1, 2] and str(dataset.skip_counter) == "2 images, 1 skipped: 1 too large"


def old_gnu_sparse(tar: tarfile.TarFile, name: str, size: int) -> None:
    """Append a sparse file of a given size that stores one block."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = b"%011o\0" % 512, tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % sum(bytes(header[:148]) + b" " * 8 + bytes(header[156:]))
    tar.fileobj.write(bytes(header) + bytes(512))
    tar.offset += 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes only on Linux")
def test_compressed_shards_do_not_fill_memory(tmp_path):
    """One compressed megabyte expands to 272, as a member or as a header."""
    info, big = tarfile.TarInfo("bomb.png"), 17 << 24
    info.size = big
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, big
    for name, first in (("a", info), ("b", header)):
        with gzip.open(tmp_path / f"{name}.tar", "wb", 1) as file:
            good = tarfile.TarInfo("0.png")
            good.size = len(square(1))
            file.write(good.tobuf() + square(1).ljust(512, b"\0") + first.tobuf())
            for _ in range(big >> 24):
                file.write(bytes(1 << 24))
            file.write(bytes(1024))
    program = (
        "from clipgen.data.webdataset import ImageShards\n"
        "print(*(len(list(ImageShards(f'{sys.argv[1]}/{name}.tar', 8, train=False))) for name in 'ab'))"
    )
    grown, printed = peak_of(program, tmp_path)
    assert printed.startswith("1 1\n") and grown < 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes only on Linux")
def test_a_block_of_a_compressed_shard_does_not_fill_memory(tmp_path):
    """Ten kilobytes of bzip2 expand to gigabytes; the decoder of xz keeps as much as the file asks for."""
    make_tar(tmp_path / "good.tar", [("0.png", square(1))])
    good = (tmp_path / "good.tar").read_bytes()[:1024]
    info = tarfile.TarInfo("notes.bin")
    info.size = 60 << 24
    compressors = {"bz2": bz2.BZ2Compressor(), "xz": lzma.LZMACompressor(preset=0), "gz": zlib.compressobj(1, 8, 31)}
    for name, compressor in compressors.items():
        with (tmp_path / f"{name}.tar").open("wb") as file:
            for part in (good, info.tobuf(), *[bytes(1 << 24)] * 60, bytes(1024)):
                file.write(compressor.compress(part))
            file.write(compressor.flush())
    ask_for_a_gigabyte(tmp_path / "xz.tar")
    program = (
        "from clipgen.data.webdataset import ImageShards\n"
        "for name in ('bz2', 'gz'): print(len(list(ImageShards(f'{sys.argv[1]}/{name}.tar', 8, train=False))))\n"
        "try: ImageShards(f'{sys.argv[1]}/xz.tar', 8, train=False)\n"
        "except ValueError as error: print(error)"
    )
    grown, printed = peak_of(program, tmp_path)
    assert printed.startswith("1\n1\n") and "must be a tar file" in printed and grown < 200


def ask_for_a_gigabyte(path: Path) -> None:
    """Change the size of the dictionary in the first block of an xz file."""
    content = bytearray(path.read_bytes())
    header = slice(12, 12 + 4 * content[12])
    content[16] = 36
    path.write_bytes(
        content[: header.stop] + struct.pack("<I", zlib.crc32(content[header])) + content[header.stop + 4 :]
    )


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_read(kind, tmp_path):
    """Also if they were compressed in several parts, with padding between them."""
    path = make_tar(tmp_path / "a.tar", [(f"{number}.png", square(number)) for number in range(4)])
    content = path.read_bytes()
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
    padding = bytes(4) if kind == "xz" else b""
    path.write_bytes(compress(content[:1500]) + padding + compress(content[1500:]))
    dataset = ImageShards(str(path), 8, train=False)
    assert reds(dataset) == [0, 1, 2, 3] and dataset.count_images().images == 4


def test_any_damage_of_a_shard_is_counted(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{number}.png", square(number)) for number in range(4)])
    intact = path.read_bytes()
    size = 512 + (len(square(0)) + 511) // 512 * 512
    assert reds(ImageShards(str(path), 8, train=False)) == [0, 1, 2, 3]
    damaged = bytearray(intact)
    damaged[2 * size + 10] ^= 255  # in the third header, which tarfile would take for the end
    for content in (bytes(damaged), intact[: 2 * size], intact[: 2 * size + 100], intact[: 2 * size + 540]):
        path.write_bytes(content)
        dataset = ImageShards(str(path), 8, train=False)
        assert reds(dataset) == [0, 1] and str(dataset.skip_counter) == "2 images, 1 skipped: 1 broken shard"
    path.write_bytes(intact + intact)  # cat a.tar a.tar
    assert reds(ImageShards(str(path), 8, train=False)) == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("label", [b"9" * 30, b"-1", b"x", b"", b"2147483648", b"1" * 5000])
def test_invalid_labels_are_counted(label, tmp_path):
    files = [("0.png", square(1)), ("0.cls", label), ("1.png", square(2)), ("1.cls", b"1")]
    dataset = ImageShards(str(make_tar(tmp_path / "a.tar", files)), 8, train=False, labels=True)
    assert [sample["label"] for sample in dataset] == [1] and "1 without label" in str(dataset.skip_counter)


# ----------------------------------------------------------------------------------------------------------- messages


def test_warnings_per_reason_are_limited(tmp_path, caplog, monkeypatch):
    files = [(f"{number}.png", b"broken") for number in range(500)] + [("x.png", square(1)), ("y.jpg", b"")]
    make_tar(tmp_path / "shard.tar", files)
    # the hashes of the names, by which images are counted, may collide: a relative path makes them the same every time
    monkeypatch.chdir(tmp_path)
    dataset = ImageShards("shard.tar", 8, train=False)
    assert len(list(dataset)) == 1 and str(dataset.skip_counter) == "1 image, 501 skipped: 1 empty, 500 not an image"
    assert len(warnings_of(caplog)) < 30 and "counted, not named" in caplog.text and "y.jpg: empty" in caplog.text


def test_escape_sequences_in_names_are_escaped(tmp_path, caplog):
    path = make_tar(tmp_path / "a.tar", [(f"{ESCAPE}.png", b"x"), ("0.png", square(1)), ("new\nline.png", b"x")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"{ESCAPE}.png").write_bytes(b"x")
    (tmp_path / "folder" / "a.png").write_bytes(square(1))
    list(ImageShards(str(path), 8, train=False))
    ImageFolder(tmp_path / "folder", 8, train=False)
    assert len(warnings_of(caplog)) == 3
    assert all(message.isprintable() for message in caplog.messages) and r"\x1b]0;owned\x07.png" in caplog.text


def test_image_prompts_are_reduced_in_size(tmp_path):
    """In floating-point numbers, this file of 20 kB would take four times 400 MB."""
    path = tmp_path / "large.png"
    path.write_bytes(blank_png(9000, 3000))
    assert read_image(path).size == (4096, 1365)


def test_large_images_are_evaluated_at_a_size_that_was_chosen(tmp_path):
    (tmp_path / "large.png").write_bytes(blank_png(4000, 3000))
    with pytest.raises(ValueError, match="image_size must be given for images above 1024 pixels, got 4000 x 3000"):
        FolderImages(tmp_path)
    assert FolderImages(tmp_path, image_size=64).image_size == 64


# ------------------------------------------------------------------------------------------ clipgen-sample --reproduce


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_reproduce_refuses_a_decompression_bomb(side, tmp_path, call):
    bomb = blank_png(side, side, rows=1)
    (tmp_path / "a.png").write_bytes(bomb)
    result = call("clipgen-sample", "--reproduce", "a.png")
    assert result.code == 1 and "a.png is not an image of clipgen-sample: too large" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- folders


def test_unreadable_folder_is_counted(tmp_path, caplog, monkeypatch):
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(square(1))
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    dataset = ImageFolder(tmp_path, 8, train=True)
    assert str(dataset.skip_counter) == "1 image, 1 skipped: 1 unreadable"
    assert f"skipped {tmp_path / 'b'}: unreadable (the folder cannot be listed: Permission denied)" in caplog.text
    with pytest.raises(PermissionError, match="cannot be listed") as caught:
        find_images(tmp_path)  # an evaluation of the rest would give another result
    assert caught.value.filename == str(tmp_path / "b")


def test_file_names_that_are_not_utf8_are_used(tmp_path, tiny_vqgan, shapes_clip):
    from clipgen.data.folder import folder_data
    from clipgen.precompute import write_token_cache

    try:
        for name in (b"a\xe9.png", b"b.png"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(square(1))
    except OSError:
        pytest.skip("this file system refuses such names")
    data = folder_data(tmp_path, 32, batch_size=1, val_fraction=0)
    assert write_token_cache(tmp_path / "cache", data, tiny_vqgan, shapes_clip, {})


# ------------------------------------------------------------------------------------------------------- claimed sizes


def test_claimed_length_of_a_png_chunk_reserves_no_memory(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16)).save(buffer, "PNG")
    content = buffer.getvalue()
    start = content.index(b"IDAT") - 4
    path = tmp_path / "long.png"
    path.write_bytes(content[:start] + struct.pack(">I", 2**31 - 1) + content[start + 4 :])
    tracemalloc.start()
    try:
        decode_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------- headers of a tar


def tar_header(kind: bytes, content: bytes) -> bytes:
    """Return a member of a tar file, such as an extended header."""
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def pax_record(key: str, value: str) -> bytes:
    """Return an entry of a pax header, which begins with its own length."""
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


@pytest.mark.parametrize(
    "headers",
    [
        tar_header(tarfile.GNUTYPE_LONGNAME, b"b.png\0") * 2000,
        tar_header(tarfile.XHDTYPE, pax_record("path", "b.png")) * 2000,
        tar_header(tarfile.XHDTYPE, pax_record("size", str(10**15))),
        tar_header(tarfile.XHDTYPE, pax_record("size", "-512")),
        tar_header(tarfile.XHDTYPE, pax_record("GNU.sparse.map", "0,x")),
        tar_header(tarfile.XGLTYPE, pax_record("path", "b.txt")),
    ],
    ids=["long names", "paths", "huge size", "negative size", "sparse", "global"],
)
def test_odd_headers_of_a_shard_neither_hang_nor_crash(tmp_path, headers):
    first, bad = (
        make_tar(tmp_path / "0.tar", [("0.png", square(1))]),
        make_tar(tmp_path / "1.tar", [("a.png", square(2))]),
    )
    path = tmp_path / "shard.tar"
    path.write_bytes(first.read_bytes() + headers + bad.read_bytes())
    dataset = ImageShards(str(path), 8, train=False)
    assert reds(dataset)[0] == 1 and dataset.skip_counter.num_used == 1
    assert dataset.count_images().images >= 1


def test_global_headers_of_a_shard_do_not_add_up(tmp_path):
    headers = b"".join(tar_header(tarfile.XGLTYPE, pax_record(f"key{i}", "a" * 100)) + EMPTY_FILE for i in range(50))
    path = make_tar(tmp_path / "0.tar", [("0.png", square(1))])
    path.write_bytes(headers + path.read_bytes())
    with path.open("rb") as file, tar_module._Archive.open(fileobj=file, mode="r|*") as archive:
        while archive.next() is not None:
            assert not archive.pax_headers


EMPTY_FILE = tar_header(tarfile.REGTYPE, b"")


def test_shard_that_may_not_be_read_is_reported_as_such(tmp_path, monkeypatch):
    shard = make_tar(tmp_path / "a.tar", [("0.png", square(1))])

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(shard))

    monkeypatch.setattr(tarfile.TarFile, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        ImageShards(str(shard), 8, train=True)


def test_named_pipe_as_a_shard_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar must be a tar file"):
        ImageShards(str(tmp_path / "*.tar"), 8, train=False)
    assert shards_module.estimate_images([str(tmp_path / "a.tar")]) is None


def test_tiles_larger_than_a_tiff_are_refused(tmp_path):
    data = zlib.compress(bytes(1000))
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (284, 1), (322, 32768), (323, 32768)]
    offset = 10 + 12 * (len(tags) + 2) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (324, offset), (325, len(data))]
    )
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 2) + entries + bytes(4) + data)
    with pytest.raises(UnusableImageError, match="too large"):
        decode_image(path)

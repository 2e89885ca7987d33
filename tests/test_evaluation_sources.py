"""Sources of images: a pipeline, and a folder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from image_data import square, warnings_of
from PIL import Image

from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset
from clipgen.evaluation.sources import FolderImages, RealImages, make_generate_fn
from clipgen.images import save_png
from clipgen.pipeline import prompt_metadata


def test_different_image_sizes_are_warned_about_once(tmp_path, caplog):
    for name, size in (("a", (16, 16)), ("b", (16, 16)), ("c", (24, 20)), ("d", (20, 24))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    for image_size, mentioned in ((None, 1), (16, 0)):
        caplog.clear()
        source = FolderImages(tmp_path, image_size, workers=1)
        assert [images.shape for images, _ in source.read(source.chunks[0])] == [(4, 3, 16, 16)]
        warnings = [record.message.startswith("c.png is 24 x 20, but the first image of") for record in caplog.records]
        assert warnings == [True] * mentioned
    caplog.clear()
    for name in "abcd":
        Image.new("RGB", (24, 20), "red").save(tmp_path / f"{name}.png")  # all alike, if not square
    source = FolderImages(tmp_path, workers=1)
    assert [images.shape for images, _ in source.read(source.chunks[0])] == [(4, 3, 20, 20)] and not caplog.records


def test_reranking_takes_the_best_of_the_same_samples(pipe):
    captions = [str(a) for a in ALL_ATTRIBUTES[:3]]
    best = make_generate_fn(pipe, rerank_from=4)(captions, [0, 1, 2])
    text = pipe.clip.encode_text(captions)
    for i in range(3):
        four = pipe.generate(text[i : i + 1].expand(4, -1), [4 * i + j for j in range(4)])
        scores = pipe.clip.encode_image(four) @ text[i]
        assert torch.allclose(best[i], four[scores.argmax()], atol=1e-5)


def test_captions_of_a_folder(two_folders, tmp_path):
    folder = two_folders[0]
    source = FolderImages(folder, captions="embedded")
    assert source.captions == [str(a) for a in ShapesDataset(24, seed=1).attributes]
    by_name = [(f"{i:03d}.png", f"caption {i}") for i in reversed(range(24))]
    assert FolderImages(folder, captions=by_name).captions[3] == "caption 3"
    with pytest.raises(ValueError, match=r"none for 000\.png"):
        FolderImages(folder, captions=by_name[:5])
    with pytest.raises(ValueError, match="one per image, got 2 for 24 images"):
        FolderImages(folder, captions=[(None, "a"), (None, "b")])
    Image.new("RGB", (8, 8)).save(tmp_path / "silent.png")
    with pytest.raises(ValueError, match=r"neither .*silent\.png nor a silent\.txt next to it"):
        FolderImages(tmp_path, captions="embedded")


@pytest.mark.parametrize("with_kind", [True, False])
@pytest.mark.parametrize("prompt", [Image.new("RGB", (8, 8)), torch.ones(4), {"a cat": 0.5, "a dog": 0.5}])
def test_description_of_a_prompt_that_is_not_a_text_is_not_a_caption(prompt, with_kind, tmp_path):
    metadata = prompt_metadata(prompt)
    if not with_kind:  # as older versions wrote it
        del metadata["prompt_kind"]
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    with pytest.raises(ValueError, match=r"neither .*a\.png nor a a\.txt next to it contains one"):
        FolderImages(tmp_path, captions="embedded")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", prompt_metadata("an image"))
    assert FolderImages(tmp_path, captions="embedded").captions == ["an image"]


def test_grids_are_left_out_of_the_images_and_of_the_reference(two_folders, tmp_path):
    for number in range(3):
        shutil.copy(two_folders[0] / f"00{number}.png", tmp_path)
    Image.new("RGB", (99, 40), "red").save(tmp_path / "grid.png")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "more" / "preview.png")
    expected = ["000.png", "001.png", "002.png"]
    assert FolderImages(tmp_path).files == expected and list(RealImages(str(tmp_path), 32).dataset.files) == expected
    for number in range(3):
        (tmp_path / f"00{number}.png").unlink()
    with pytest.raises(ValueError, match="must contain images, got only grids of images"):
        RealImages(str(tmp_path), 32)


def test_empty_sidecar_file_is_not_a_caption(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(ValueError, match=r"neither .*a\.png nor a a\.txt next to it contains one"):
        FolderImages(tmp_path, captions="embedded")
    (tmp_path / "a.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt must be UTF-8 text"):
        FolderImages(tmp_path, captions="embedded")


def test_captions_by_line_follow_natural_order(tmp_path, caplog):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(square(number))
    lines = [(None, f"caption {number}") for number in range(12)]
    source = FolderImages(tmp_path, captions=lines)
    assert dict(zip(source.files, source.captions)) == {f"{n}.png": f"caption {n}" for n in range(12)}
    (warning,) = warnings_of(caplog)
    assert "line 3 belongs to 2.png (in alphabetical order: 10.png)" in warning


def test_a_folders_distance_from_itself_is_zero(tmp_path):
    """Large JPEGs are decoded at a part of their size, on both sides."""
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((400, 300)).save(tmp_path / f"{number}.jpg")
    sides = []
    for source in (FolderImages(tmp_path, 32), RealImages(str(tmp_path), 32)):
        sides.append(torch.cat([images for chunk in source.chunks for images, _ in source.read(chunk)]))
    assert torch.equal(*sides)

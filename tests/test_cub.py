"""Captions of CUB-200-2011, on a small copy of its folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgen.evaluation import cub
from clipgen.evaluation.captions import group_by_image, read_captions

ALBATROSS = "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18"
BUNTING = "014.Indigo_Bunting/Indigo_Bunting_0001_12469"
WREN = "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521"


@pytest.fixture
def birds(tmp_path) -> Path:
    """Return a copy of CUB_200_2011 with the captions in ``text_c10``: two images for training, one for testing."""
    folder = tmp_path / "CUB_200_2011"
    for name, texts in ((ALBATROSS, "a black bird .\na long beak .\n"), (BUNTING, "a blue bird\n"), (WREN, "yellow\n")):
        path = folder / "text_c10" / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(texts)
    (folder / "images.txt").write_text(f"1 {ALBATROSS}.jpg\n2 {BUNTING}.jpg\n3 {WREN}.jpg\n")
    (folder / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n")
    return folder


def test_captions_of_the_test_split_are_the_default(birds):
    expected = [(f"{ALBATROSS}.jpg", "a black bird ."), (f"{ALBATROSS}.jpg", "a long beak .")]
    assert read_captions(birds) == expected == read_captions(birds, "test")
    assert [text for _, text in read_captions(birds, "train")] == ["a blue bird", "yellow"]
    assert group_by_image(read_captions(birds, "all")) == [
        ["a black bird .", "a long beak ."],
        ["a blue bird"],
        ["yellow"],
    ]


def test_text_folder_alone_or_beside_the_index_is_read(birds, tmp_path):
    assert len(read_captions(birds / "text_c10")) == 2  # images.txt stands above it
    alone = (birds / "text_c10").rename(tmp_path / "text_c10")
    assert [file for file, _ in read_captions(alone)] == [
        f"{name}.jpg" for name in (ALBATROSS, ALBATROSS, BUNTING, WREN)
    ]
    with pytest.raises(ValueError, match=r"split test needs images\.txt and train_test_split\.txt in .*text_c10"):
        read_captions(alone, "test")


def test_replacement_characters_and_empty_lines_are_removed(birds):
    (birds / "text_c10" / f"{ALBATROSS}.txt").write_text("a \ufffdbird\ufffd\n\n  \na beak\n")
    assert [text for _, text in read_captions(birds)] == ["a  bird", "a beak"]


def write(path: str, content: str):
    """Return a function that writes a file below the folder of CUB."""
    return lambda folder: (folder / path).write_bytes(content.encode("latin-1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("images.txt", "1 ../../secret.jpg\n"), "must contain paths below its folder, got '../../secret.jpg'"),
        (write("images.txt", "1 /etc/passwd\n"), "must contain paths below its folder, got '/etc/passwd'"),
        (
            write("images.txt", "1 a.jpg\n1 b.jpg\n"),
            "a new number and a value in each line, got '1 b.jpg'",
        ),
        (write("images.txt", "a.jpg\n"), "must contain a new number and a value in each line, got 'a.jpg'"),
        (write("images.txt", f"1 {WREN}_2.jpg\n"), "must contain a text file per image, got none for 1 of 1"),
        (write("train_test_split.txt", "1 0\n2 1\n"), "train_test_split.txt must contain 0 or 1 for image 3, got None"),
        (write("train_test_split.txt", "1 0\n2 1\n3 yes\n"), "must contain 0 or 1 for image 3, got 'yes'"),
        (write("train_test_split.txt", "1 1\n2 1\n3 1\n"), "captions must be texts, got none in"),
        (write(f"text_c10/{ALBATROSS}.txt", "\n \n"), "must contain captions, got none"),
        (write(f"text_c10/{ALBATROSS}.txt", "a caf\xe9"), "must be UTF-8 text"),
        (write(f"text_c10/{ALBATROSS}.txt", "a" * (cub.MAX_TEXT_BYTES + 1)), "must have at most 1048576 bytes"),
        (lambda folder: (folder / "train_test_split.txt").unlink(), r"split test needs train_test_split\.txt next to"),
    ],
)
def test_damaged_copies_are_refused_in_one_sentence(birds, damage, message):
    damage(birds)
    with pytest.raises(ValueError, match=message) as error:
        read_captions(birds, "test")
    assert str(birds) in str(error.value) and "\n" not in str(error.value)


def test_empty_folder_holds_no_captions(tmp_path):
    with pytest.raises(ValueError, match="captions must be texts, got none in"):
        read_captions(tmp_path)

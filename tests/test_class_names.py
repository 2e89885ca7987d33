"""Names of classes in the formats in which they are distributed, on small copies of them."""

from __future__ import annotations

import json
import os

import pytest

from clipgen.baselines.generators import read_class_names
from clipgen.data.class_names import MAX_NAMES_BYTES, read_names
from clipgen.evaluation.captions import read_classes

SYNSETS = (
    "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\nn01484850 great white shark, white shark\n"
)
KERAS = {"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"], "2": ["n01484850", "great_white_shark"]}


def test_synset_mapping_gives_the_first_names_in_the_order_of_torchvision(tmp_path):
    """torchvision sorts the synsets, whatever the order of the file."""
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text(SYNSETS)
    assert read_names(path) == ["tench", "goldfish", "great white shark"]
    assert [name for _, name in read_classes(path)] == read_names(path) == read_class_names(str(path))


def test_keras_index_is_ordered_by_number(tmp_path):
    path = tmp_path / "imagenet_class_index.json"
    path.write_text(json.dumps(KERAS))
    assert read_names(path) == ["tench", "goldfish", "great_white_shark"]
    assert [name for _, name in read_classes(path)] == read_names(path)


def test_cub_classes_are_read_as_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    assert read_names(path) == ["Black footed Albatross", "Laysan Albatross"]
    assert [name for _, name in read_classes(path)] == read_names(path)


def test_lists_of_imagenet_have_the_order_of_torchvision():
    """Both lists name class 1 goldfish and class 207 golden retriever."""
    for source in ("imagenet", "imagenet-torchvision"):
        names = read_class_names(source)
        assert len(names) == 1000 and names[1].lower() == "goldfish" and names[207].lower() == "golden retriever"
        assert [name for _, name in read_classes(source)] == names


def test_other_lists_are_read_as_before(tmp_path):
    (tmp_path / "a.txt").write_text("cat\n\n dog \n")
    (tmp_path / "b.json").write_text('["cat", "dog"]')
    assert read_names(tmp_path / "a.txt") == read_names(tmp_path / "b.json") == ["cat", "dog"]
    (tmp_path / "c.json").write_text('{"1.png": "cat"}')
    assert read_classes(tmp_path / "c.json") == [("1.png", "cat")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n01440764 tench\nn01440764 tench\n", "each synset must occur once, got n01440764 twice"),
        ("n01440764 tench\ngoldfish\n", "each line must be a synset and its names, got 'goldfish'"),
        ("n01440764 , Tinca\n", "a list of class names|an empty one"),
        ("1 001.Albatross\n3 003.Wren\n", r"line 2 must be '2 002\.NAME', got '3 003\.Wren'"),
        ('{"0": ["n1", "tench"], "7": ["n2", "goldfish"]}', "classes must be numbered from 0, got none with number 1"),
        ('{"0": ["n1", 3]}', "each class must be a pair of synset and name"),
        ('{"0": ["n1", "ten', "class names"),
        ("{" * 100_000, "class names"),
        ("", "class names|captions cannot be read"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "names.json"
    path.write_text(content)
    for read in (read_names, read_classes):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_large_files_are_refused(tmp_path):
    path = tmp_path / "names.txt"
    with path.open("wb") as file:
        file.truncate(MAX_NAMES_BYTES + 1)
    with pytest.raises(ValueError, match="must have at most"):
        read_names(path)


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "names.txt")
    with pytest.raises(FileNotFoundError, match="class names must be in a file"):
        read_names(tmp_path / "names.txt")


def test_class_names_of_imagenet():
    names = read_class_names("imagenet")
    assert len(names) == 1000 and names[0] == "tench" and names[207].lower() == "golden retriever"

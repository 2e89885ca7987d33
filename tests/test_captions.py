"""Captions in every format, and their selection."""

from __future__ import annotations

import json

import pytest

from clipgen.evaluation.captions import (
    MAX_CAPTIONS_BYTES,
    Caption,
    group_by_image,
    read_captions,
    read_classes,
    select_captions,
    write_captions,
)


def test_captions_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "b.txt").write_text("1.png\ta cat\n")
    (tmp_path / "c.json").write_text(json.dumps(["a cat"]))
    (tmp_path / "d.json").write_text(json.dumps({"x/1.png": "a cat"}))
    coco = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A bus."}]}
    (tmp_path / "e.json").write_text(json.dumps(coco))
    read = lambda name: read_captions(tmp_path / name)
    assert read("a.txt") == [(None, "a cat"), (None, "a dog")] and read("b.txt") == [("1.png", "a cat")]
    assert read("c.json") == [(None, "a cat")] and read("d.json") == [("x/1.png", "a cat")]
    assert read("e.json") == [("7.jpg", "A bus.")] and len(read_captions("shapes")) == 288
    for name, content in (("f.json", "{"), ("g.json", '{"annotations": 3}'), ("h.txt", ""), ("i.json", '["a", " "]')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read(name)
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        read("nothing.txt")


def test_metadata_of_an_image_folder(tmp_path):
    lines = [{"file_name": "1.png", "text": "a cat"}, {"caption": "a dog", "file_name": "x/2.png", "width": 4}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_captions(tmp_path / "metadata.jsonl") == [("1.png", "a cat"), ("x/2.png", "a dog")]


def test_captions_with_byte_order_mark_crlf_and_tabs(tmp_path):
    """A byte order mark, CRLF, line separators within a caption, and tabs within one after a file's name."""
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\na\u2028dog\r\n".encode())
    (tmp_path / "b.txt").write_text("1.png\ta cat\ton a mat\n")
    (tmp_path / "c.JSON").write_bytes(b'\xef\xbb\xbf["a cat"]')
    assert read_captions(tmp_path / "a.txt") == [(None, "a cat"), (None, "a\u2028dog")]
    assert read_captions(tmp_path / "b.txt") == [("1.png", "a cat\ton a mat")]
    assert read_captions(tmp_path / "c.JSON") == [(None, "a cat")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "1.png\ta cat\na dog\n", "must precede every caption, or none"),
        ("a.txt", "1.png\ta cat\n2.png\t\n", "an empty one"),
        ("a.json", '[{"caption": "a cat"}]', "each caption must be a text, got {'caption': 'a cat'}"),
        ("a.json", '{"1.png": ["a cat", "a pet"]}', "each caption must be a text"),
        ("a.json", "[null]", "got None"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "caption": 3}]}',
            "got 3",
        ),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "must contain COCO's images"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', "must contain COCO's images .* got 'file_name'"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "must contain COCO's images"),
        ("a.json", '{"annotations": [3]}', "must contain COCO's images .* got 'images'"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": 7}], "annotations": [{"image_id": 1, "caption": "x"}]}',
            "each caption must be a text of a file, got 'x' of 7",
        ),
        ("a.json", '"a cat"', "a list, a mapping or COCO's layout"),
        ("a.json", "{}", "got none in"),
        ("a.csv", "1.png,a cat\n", r"\.csv is not read; it must contain lines of a caption, .* \(\.jsonl\)"),
        (
            "a.txt",
            '{"file_name": "1.png", "text": "a cat"}\n',
            r"JSON objects, which belong in \.jsonl; it must contain",
        ),
        ("a.jsonl", '{"file_name": "1.png"}\n', "file_name and text or caption, got {'file_name': '1.png'} in line 1"),
        ("a.jsonl", '\n["a cat"]\n', "in line 2"),
        ("a.jsonl", "a cat\n", "cannot be read from"),
    ],
)
def test_files_without_captions_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_captions(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_selection_is_a_subset_or_all_in_turn():
    few = [Caption(None, "a"), Caption(None, "b")]
    assert [text for _, text in select_captions(few, 5, 0)] == ["a", "b", "a", "b", "a"]
    many = [Caption(f"{i}.png", str(i)) for i in range(100)]
    selected = select_captions(many, 10, 1)
    assert selected == select_captions(many, 10, 1)
    assert len(set(selected)) == 10
    assert selected == sorted(selected, key=lambda caption: int(caption.text))
    assert selected != select_captions(many, 10, 2)


def test_selection_counts_images_of_several_captions(tmp_path):
    captions = [Caption(f"{i // 5}.png", f"{i // 5} in words {i % 5}") for i in range(500)]
    selected = select_captions(captions, 60, 3)
    assert len({file for file, _ in selected}) == 60
    assert len({text.split()[-1] for _, text in selected}) == 5  # not always the first
    assert selected == sorted(selected, key=lambda caption: int(caption.file.removesuffix(".png")))
    assert set(select_captions(captions, 500, 3)) == set(captions)
    assert len({file for file, _ in select_captions(captions, 100, 3)}) == 100
    write_captions(tmp_path / "captions.txt", selected)
    assert read_captions(tmp_path / "captions.txt") == selected


def test_classes_of_imagenet_are_known():
    classes = read_classes("imagenet")
    assert len(classes) == 1000
    assert classes[0] == (None, "tench")


def test_coco_images_have_several_captions(tmp_path):
    """The published files hold line breaks, and images without captions."""
    images = [{"id": 9, "file_name": "COCO_val2014_9.jpg"}, {"id": 4, "file_name": "COCO_val2014_4.jpg"}]
    texts = [(9, "A bus. "), (9, "A red\nbus."), (9, "Traffic")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(texts)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    captions = read_captions(tmp_path / "captions_val2014.json")
    assert captions == [("COCO_val2014_9.jpg", text) for text in ("A bus.", "A red bus.", "Traffic")]
    assert group_by_image(captions) == [["A bus.", "A red bus.", "Traffic"]]


def test_caption_files_are_bounded(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MAX_CAPTIONS_BYTES + 1)
    with pytest.raises(ValueError, match="must have at most 536870912 bytes"):
        read_captions(tmp_path / "a.json")
    with pytest.raises(ValueError, match="split must be given with a folder"):
        read_captions(tmp_path / "a.json", "train")

"""Names of files: their natural order."""

from __future__ import annotations

from clipgen.storage.files import natural_key


def test_natural_key_sorts_numbers_by_value():
    ordered = ["0.png", "1.png", "2.png", "9.png", "010.png", "11.png", "a/2/1.png", "a/10/1.png", "b_2_3", "b_2_12"]
    assert sorted(sorted(ordered), key=natural_key) == ordered
    assert natural_key("9" * 5000) > natural_key("8" * 5000) > natural_key("9" * 4999)

"""Values are compared with type annotations."""

from __future__ import annotations

import pytest

from clipgen.type_checks import fits, type_in_words


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        ("1", int, False),
        (None, int, False),
        (1, float, True),
        (1e-3, float, True),
        (False, float, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (1, str, False),
        (None, str | None, True),
        (3, str | None, False),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        (3, str | list[str], False),
        ("a", str | list[str], True),
    ],
)
def test_values_fit_type_annotations(value, annotation, expected):
    assert fits(value, annotation) is expected


def test_type_annotations_in_messages():
    assert type_in_words(str | list[int] | None) == "str or list of int or null"

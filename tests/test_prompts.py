"""Prompts: mixtures, and files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgen.generation.prompts import describe, parse_mixture, read_prompts


def test_a_device_without_end_is_not_a_file_of_prompts():
    with pytest.raises(ValueError, match="/dev/zero must contain at most 16777216 bytes of prompts"):
        read_prompts(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7 a cat + 0.3 a dog", {"a cat": 0.7, "a dog": 0.3}),
        ("a cat - 0.5 a dog", {"a cat": 1.0, "a dog": -0.5}),
        ("-1 a well-known cat + .5 a dog + .5 a dog", {"a well-known cat": -1.0, "a dog": 1.0}),
        ("a cat", {"a cat": 1.0}),
        ("- 2 a cat + a dog", {"a cat": -2.0, "a dog": 1.0}),
        ("1e-5 a cat + 2. a dog", {"a cat": 1e-5, "a dog": 2.0}),
        ("a 3d cat + 3d art", {"a 3d cat": 1.0, "3d art": 1.0}),
    ],
)
def test_mixtures_are_parsed_and_described(text, expected):
    assert parse_mixture(text) == expected
    assert parse_mixture(describe(expected)) == expected


@pytest.mark.parametrize("text", ["", "  ", "a cat + ", "+"])
def test_empty_mixture_terms_raise(text):
    with pytest.raises(ValueError, match="a mixture must be terms such as"):
        parse_mixture(text)


@pytest.mark.parametrize("term", ["0,7 a red ring", "70% a red ring", "1/2 a red ring", "0.7", "1.2.3 a red ring"])
def test_weights_that_are_not_numbers_raise(term):
    with pytest.raises(ValueError, match=f"must be a number with a decimal point and a text.*got '{term}'"):
        parse_mixture(f"{term} + 0.3 a blue ring")

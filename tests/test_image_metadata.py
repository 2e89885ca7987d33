"""Metadata in the images of ``clipgen-sample``, of which it makes the same image again."""

from __future__ import annotations

import json

import pytest
from commands import ESCAPE, PROMPT
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS = dict(temperature=1.0, top_k=1, top_p=1.0, guidance_scale=1.0, guidance_power=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolate": '["a", "b"]', "steps": "1000000000"}, r"steps must be in \[2, 1000\], got 1000000000"),
        ({"interpolate": '["a", "b"]', "steps": "NaN"}, "steps must be a whole number, got nan"),
        ({"interpolate": '["a"]', "steps": "3"}, "interpolate must be two prompts, got a list"),
        ({"interpolate": "[" * 100_000, "steps": "3"}, "interpolate must be JSON"),
        ({"prompt": "a" * 1_000_000}, "prompt must have at most 10000 letters, got 1000000"),
        ({"seed": "[]"}, "seed must be a whole number, got a list"),
        ({"seed": "true"}, "seed must be a whole number, got True"),
        ({"seed": "9" * 5000}, "seed must be JSON"),
        ({"top_k": "null"}, "top_k must be a whole number, got None"),
        ({"top_k": '"1"'}, "top_k must be a whole number, got '1'"),
        ({"temperature": "1e999"}, "temperature must be finite"),
        ({"prompt_mix": '{"a": "b"}'}, "prompt_mix must have numbers for weights, got 'b'"),
        ({"prompt_mix": "[1]"}, "prompt_mix must be 1 to 100 texts with weights, got a list"),
        ({"dtype": ESCAPE}, r"dtype must be one of float32, bfloat16, got '\\x1b"),
    ],
)
def test_reproduce_checks_the_metadata(change, message, tmp_path, call):
    info = PngInfo()
    for key, value in (
        {"prompt": PROMPT, "seed": "0"} | {k: json.dumps(v) for k, v in SETTINGS.items()} | change
    ).items():
        info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    result = call("clipgen-sample", "--reproduce", "a.png")
    (line,) = result.stderr.splitlines()
    assert result.code == 1 and line.startswith("clipgen-sample: error: a.png is not an image of clipgen-sample: ")
    assert message.replace("\\[", "[").replace("\\]", "]").replace("\\\\", "\\") in line and line.isprintable()

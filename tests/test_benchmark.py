"""scripts/benchmark.py: that each part runs, at the smallest sizes."""

from __future__ import annotations

import json
import sys

import benchmark
import pytest

from clipgen.data.token_cache import record_dtype


@pytest.mark.parametrize("source", ["images", "cache"])
def test_stage_2_is_measured(source):
    row = benchmark.measure_transformer("demo", source, "clip_loss+every_4+quarter", 2, 4, "cpu", "shapes")
    assert row["tokens/s"] == pytest.approx(64 * row["images/s"]) and row["images/s"] > 0


def test_reading_a_cache_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark, "record_dtype", lambda *_: record_dtype(1, 1, 16384, 1))  # of 2.4 MB
    assert benchmark.reading_rate() > 0


def test_stage_1_is_measured():
    row = benchmark.measure_vqgan("cifar", "ema+lecam", 2, 1, "cpu", perceptual=False)
    assert all(value > 0 for value in row.values())


def test_drawing_is_measured(tmp_path, monkeypatch):
    sizes = ["--n-layer", 1, "--n-head", 2, "--n-embd", 8, "--codebook-size", 16, "--num-tokens", 4, "--batches", 1, 3]
    files = ["--output", tmp_path / "found.json", "--plot", tmp_path / "growth.png"]
    arguments = ["benchmark.py", "sample", "--steps", 1, *sizes, *files]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    benchmark.main()
    assert set(json.loads((tmp_path / "found.json").read_text())["rows"]) == {"T 4, batch 1", "T 4, batch 3"}
    assert (tmp_path / "growth.png").is_file()


@pytest.mark.parametrize(("part", "variant"), [("vqgan", "clip_loss"), ("transformer", "ema+channels_last")])
def test_options_of_another_part_are_refused(part, variant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", part, "--variants", "plain", variant])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f", got {variant.split('+')[-1]}" in capsys.readouterr().err

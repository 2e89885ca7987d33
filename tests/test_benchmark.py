"""scripts/benchmark.py: that each part runs, at the smallest sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import torch

from clipgen.data.token_cache import record_dtype
from clipgen.processor import instruction_set


@pytest.mark.parametrize("source", ["images", "cache"])
def test_stage_2_is_measured(source):
    row = benchmark.measure_transformer("demo", source, "clip_loss+every_4+quarter", 2, 4, "cpu", "shapes")
    assert row["tokens/s"] == pytest.approx(64 * row["images/s"]) and row["images/s"] > 0


def test_muon_is_a_variant_of_stage_2_alone():
    assert "muon" in benchmark.options_of("transformer") and "muon" not in benchmark.options_of("vqgan")
    row = benchmark.measure_transformer("demo", "cache", "muon", 2, 4, "cpu", "shapes")
    assert row["images/s"] > 0


def test_the_processor_is_named():
    text = benchmark.machine("cpu")
    assert f"CPU {instruction_set()} with" in text and f"{torch.get_num_threads()} threads" in text
    assert f"torch {torch.__version__} (BLAS " in text


@pytest.mark.skipif("AVX" not in instruction_set(), reason="only x86 processors imitate AVX2")
def test_avx2_is_imitated(tmp_path):
    """In a process of its own, since libraries read the environment when they are loaded."""
    sizes = ["--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--codebook-size", 16, "--num-tokens", 4, "--batches", 1]
    arguments = ["sample", "--steps", 1, *sizes, "--isa", "avx2", "--output", tmp_path / "found.json"]
    command = [sys.executable, benchmark.__file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CPU AVX2 without bfloat16 units" in json.loads((tmp_path / "found.json").read_text())["machine"]


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

"""scripts/benchmark.py: each part runs, at the smallest sizes."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import benchmarks.muon
import pytest
import torch
from benchmarks import scale, timing, training, web_page
from benchmarks.models import VARIANTS, merge, settings_of
from benchmarks.timing import describe_machine

from clipgen.data.token_cache import record_dtype
from clipgen.hardware.processor import instruction_set, processor_name

TINY = ["--n-layer", 1, "--n-embd", 8, "--codebook-size", 16, "--num-tokens", 4]


@pytest.mark.parametrize("source", ["images", "cache"])
def test_stage_2_is_measured(source):
    row = training.measure_transformer("demo", source, "clip_loss+every_4+quarter", 2, 4, "cpu", "shapes")
    assert row["tokens/s"] == pytest.approx(64 * row["images/s"]) and row["images/s"] > 0


def test_muon_is_a_variant_of_stage_2_only():
    assert "muon" in VARIANTS["transformer"] and "muon" not in VARIANTS["vqgan"]
    row = training.measure_transformer("demo", "cache", "muon", 2, 4, "cpu", "shapes")
    assert row["images/s"] > 0


def test_variants_are_combined_in_nested_settings():
    size = {"optimizer": {"betas": [0.5, 0.9]}, "n_layer": 1}
    settings, precision = settings_of("transformer", size, "bf16+ema+muon")
    assert settings == {"optimizer": {"betas": [0.5, 0.9], "ema_decay": 0.999, "name": "muon"}, "n_layer": 1}
    assert precision == "bf16-mixed"
    assert size == {"optimizer": {"betas": [0.5, 0.9]}, "n_layer": 1}
    assert merge({}, {"gan": {"weight": 0.0}}) == {"gan": {"weight": 0.0}}


def test_machine_description_names_the_processor():
    text = describe_machine("cpu")
    assert (
        text.startswith(f"{processor_name()}, CPU {instruction_set()} with")
        and f"{torch.get_num_threads()} threads" in text
    )
    assert f"torch {torch.__version__} (BLAS " in text


@pytest.mark.skipif("AVX" not in instruction_set(), reason="only x86 processors imitate AVX2")
def test_avx2_is_imitated(tmp_path):
    """A process of its own is needed, since libraries read the environment when they are loaded."""
    output = tmp_path / "results.json"
    arguments = ["sample", "--steps", 1, "--n-head", 1, *TINY, "--batches", 1, "--isa", "avx2", "--output", output]
    command = [sys.executable, benchmark.__file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CPU AVX2 without bfloat16 units" in json.loads(output.read_text())["machine"]


def test_reading_a_cache_is_measured(monkeypatch):
    monkeypatch.setattr(training, "record_dtype", lambda *_: record_dtype(1, 1, 16384, 1))  # 2.4 MB in all
    assert training.reading_rate() > 0


def test_stage_1_is_measured():
    row = training.measure_vqgan("cifar", "ema+lecam", 2, 1, "cpu", perceptual=False)
    assert all(value > 0 for value in row.values())


def test_sampling_is_measured_and_plotted(tmp_path, monkeypatch):
    files = ["--output", tmp_path / "results.json", "--plot", tmp_path / "growth.png"]
    arguments = ["benchmark.py", "sample", "--steps", 1, "--n-head", 2, *TINY, "--batches", 1, 3, *files]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    benchmark.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert set(rows) == {"T 4, batch 1", "T 4, batch 3"}
    assert (tmp_path / "growth.png").is_file()


def test_reranking_is_measured(tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    arguments = ["benchmark.py", "rerank", "--steps", 1, "--batches", 2, "--output", output]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    benchmark.main()
    assert json.loads(output.read_text())["rows"]["2 candidates"]["reranking, s"] > 0


def test_measurements_start_without_the_module_resource(monkeypatch):
    """Windows has none."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(runpy.run_path(timing.__file__)["peak_memory"]("cpu"))
    runpy.run_path(scale.__file__)


def test_scale_is_refused_on_other_systems(monkeypatch):
    monkeypatch.setattr(scale, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(SystemExit, match="benchmark scale must run on Linux, whose /proc it reads, got win32"):
        scale.run_scale(SimpleNamespace(images=[10**6], ranks=4, scratch=None))


@pytest.mark.parametrize(("is_windows", "call"), [(False, ("send_signal", 2)), (True, ("terminate",))])
def test_server_is_interrupted_or_on_windows_ended(monkeypatch, is_windows, call):
    monkeypatch.setattr(web_page, "IS_WINDOWS", is_windows)
    calls = []
    process = SimpleNamespace(
        send_signal=lambda number: calls.append(("send_signal", number)),
        terminate=lambda: calls.append(("terminate",)),
        wait=lambda timeout: calls.append(("wait",)),
    )
    web_page.stop(process)
    assert calls == [call, ("wait",)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scale_is_simulated(tmp_path):
    order = scale.measure_order(10**9, ranks=512)
    assert order["distinct"] == 1 and order["GiB peak"] < 0.5 and order["share seen per epoch"] > 0.9999
    cache = scale.measure_cache(shards=3, scratch=tmp_path)
    assert 0 < cache["maps"] < cache["system's limit of maps"] and not list(tmp_path.iterdir())
    assert scale.measure_names(1000)["GiB peak"] < 0.1
    assert scale.measure_shards(64, ranks=4)["share seen per epoch"] == pytest.approx(1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scale_runs_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "MAX_NAMES", 1000)
    arguments = ["benchmark.py", "scale", "--images", 10**6, "--ranks", 4, "--scratch", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    benchmark.main()
    output = capsys.readouterr().out
    for part in ("order of 1e+06 images", "100 tar shards", "100 shards of a token cache", "names of 1e+03 files"):
        assert f"| {part} | seconds" in output


@pytest.mark.parametrize("options", [["--size", "demo", "--steps", 1], ["--curves", "--steps", 2]])
def test_muon_is_measured(tmp_path, monkeypatch, options):
    monkeypatch.setattr(benchmarks.muon, "RATE_SIZE", 64)
    output = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", [*map(str, ["benchmark.py", "muon", *options, "--output", output])])
    benchmark.main()
    results = json.loads(output.read_text())
    if "curves" in results:
        first, second = results["curves"].values()
        assert first != second and first == pytest.approx(second, rel=0.02) and len(first) == 2
    else:
        assert all(value > 0 for value in results["rows"]["a step"].values())


@pytest.mark.parametrize(("part", "variant"), [("vqgan", "clip_loss"), ("transformer", "ema+channels_last")])
def test_variants_of_another_part_are_refused(part, variant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", part, "--variants", "plain", variant])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f", got {variant.split('+')[-1]}" in capsys.readouterr().err

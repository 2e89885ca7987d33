"""The store of per-image features: resuming, sharing, damage, memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.evaluation.feature_store import FeatureStore, collect
from clipgen.evaluation.features import feature_extractor
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.run import evaluate, measure_reference
from clipgen.evaluation.sources import FolderImages, GeneratedImages, RealImages, make_generate_fn

pytest.importorskip("torch_fidelity")
pytestmark = pytest.mark.usefixtures("reference_cache")


def test_interrupted_evaluation_resumes_identically(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 6)
    prompts = [str(a) for a in ALL_ATTRIBUTES[:20]]
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    asked = []

    def generate(captions, seeds):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(seeds)
        return make_generate_fn(pipe)(captions, seeds)

    source = lambda how: GeneratedImages(how, prompts, 5, {"model": "tiny"}, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "interrupted", source(generate), metrics, metrics.identity())
    assert [path.name for path in sorted((tmp_path / "interrupted").iterdir())] == ["identity.json", "part-000000.npz"]
    done = []
    collect(tmp_path / "interrupted", source(make_generate_fn(pipe)), metrics, metrics.identity(), advance=done.append)
    assert done[0] == 6 and sum(done) == 20  # what was there counts as done
    collect(tmp_path / "whole", source(make_generate_fn(pipe)), metrics, metrics.identity())
    for ours, theirs in zip(FeatureStore(tmp_path / "interrupted").parts, FeatureStore(tmp_path / "whole").parts):
        with np.load(ours) as a, np.load(theirs) as b:
            assert all(np.array_equal(a[name], b[name]) for name in b.files)


def test_processes_share_the_parts(two_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 10)
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    source = FolderImages(two_folders[0])
    assert evaluate(tmp_path, source, metrics, rank=1, world_size=2) is None
    assert len(FeatureStore(tmp_path / "parts").parts) == 1
    assert evaluate(tmp_path, source, metrics, rank=0, world_size=2) is not None
    assert len(FeatureStore(tmp_path / "parts")) == 24


def test_damaged_files_are_named(two_folders, tmp_path):
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    evaluate(tmp_path, FolderImages(two_folders[0]), metrics)
    part = tmp_path / "parts/part-000000.npz"
    for content in (part.read_bytes()[:300], b"", b"junk"):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-000000\.npz is damaged .* delete it"):
            evaluate(tmp_path, FolderImages(two_folders[0]), metrics)
    part.unlink()
    assert evaluate(tmp_path, FolderImages(two_folders[0]), metrics) is not None
    (tmp_path / "parts/identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json is damaged"):
        evaluate(tmp_path, FolderImages(two_folders[0]), metrics)


def test_failure_before_the_first_part_leaves_no_identity(two_folders, tmp_path):
    (tmp_path / "other.txt").write_text("a user's own file")
    metrics = ImageMetrics(shapes=True)
    with pytest.raises(ValueError, match="caption must read like"):
        evaluate(tmp_path, FolderImages(two_folders[0], captions=[(None, "a cat")] * 24), metrics)
    assert evaluate(tmp_path, FolderImages(two_folders[0], captions="embedded"), metrics)["shapes_all"] == 1


def test_interrupted_evaluation_leaves_a_new_reference_to_another_one(two_folders, tmp_path):
    """Both measure the same reference; one of them ends before there is any part."""
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    read = RealImages.read

    class Interrupted(RealImages):
        def read(self, chunk):
            raise KeyboardInterrupt

    class Other(RealImages):
        def read(self, chunk):
            with pytest.raises(KeyboardInterrupt):
                measure_reference(Interrupted(str(two_folders[1]), 32), metrics, 0, 1)
            return read(self, chunk)

    results = evaluate(tmp_path, FolderImages(two_folders[0]), metrics, Other(str(two_folders[1]), 32))
    assert results["fid_0"] > 0


def test_nan_images_are_refused(tmp_path):
    def generate(captions, seeds):
        images = torch.zeros(len(seeds), 3, 8, 8)
        images[-1, 0, 0, 0] = math.nan
        return images

    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity in an image of 'two'"):
        collect(tmp_path, GeneratedImages(generate, ["one", "two"], 0, {}), ImageMetrics(None), {})


MANY = 12_000  # images, of which features and logits are 72 MB, and torch-fidelity's probabilities 290 MB


LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
import torch_fidelity.metric_isc, torch_fidelity.metric_kid
from clipgen.evaluation.feature_store import FeatureStore
from clipgen.evaluation.report import compute_results

folder = FeatureStore(Path(sys.argv[1]))
torch.set_num_threads(1)
now = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (now + 150_000_000,) * 2)
print(*compute_results(folder, folder))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's memory by what it writes to")
def test_memory_is_bounded_for_many_images(tmp_path):
    rng = np.random.default_rng(0)
    for start in range(0, MANY, 500):
        rows = {"key": rng.integers(2**63, size=500).astype(np.uint64)}
        rows |= {"features_0": rng.standard_normal((500, 512), np.float32)}
        np.savez(tmp_path / f"part-{start:06d}.npz", **rows, logits=rng.standard_normal((500, 1000), np.float32))
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.stdout.split() == ["is_mean", "is_std", "fid_0", "kid_mean", "kid_std", "precision", "recall"], (
        process.stderr
    )
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npz"]


def test_full_disk_is_an_error(tmp_path, monkeypatch):
    np.savez(tmp_path / "part-000000.npz", key=np.zeros(2, np.uint64), features_0=np.zeros((2, 4), np.float32))
    sizes = []

    def full(descriptor, start, size):
        sizes.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        FeatureStore(tmp_path).memmap_column("features_0", tmp_path)
    assert sizes == [32]

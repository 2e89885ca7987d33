"""Complete evaluations: metrics of sets of images, and references."""

from __future__ import annotations

import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from feature_spaces import results_of
from PIL import ImageFilter

from clipgen.evaluation.caps import load_captioner
from clipgen.evaluation.feature_store import FeatureStore, collect
from clipgen.evaluation.features import Features, feature_extractor
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.metrics import blurred
from clipgen.evaluation.report import results_table
from clipgen.evaluation.run import evaluate
from clipgen.evaluation.sources import FolderImages, GeneratedImages, RealImages
from clipgen.images import to_pil

fidelity = pytest.importorskip("torch_fidelity")
pytestmark = pytest.mark.usefixtures("reference_cache")


def test_blur_matches_pillow(images):
    for radius in (1, 2):
        for ours, image in zip(to_pil(blurred(images, radius)), to_pil(images)):
            assert np.array_equal(np.asarray(ours), np.asarray(image.filter(ImageFilter.GaussianBlur(radius))))
    assert blurred(images, 0) is images


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["inception", "inception-clean"])
def test_folder_has_the_results_of_torch_fidelity(two_folders, inception_file, tmp_path, resize):
    """The whole way from PNG files, beside torch-fidelity's own command."""
    features = feature_extractor(f"{resize}:{inception_file}")
    ours = evaluate(
        tmp_path, FolderImages(two_folders[0]), ImageMetrics(features, [0]), RealImages(str(two_folders[1]), 32)
    )
    theirs = fidelity.calculate_metrics(
        input1=str(two_folders[0]),
        input2=str(two_folders[1]),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        kid_subset_size=24,
        verbose=False,
        cache=False,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(inception_file),
    )
    pairs = {"fid_0": "frechet_inception_distance", "precision": "precision", "recall": "recall"}
    if resize == "inception":
        for name, key in pairs.items():  # theirs takes roots of a singular product's general eigenvalues: 1e-5 of noise
            assert ours[name] == pytest.approx(theirs[key], rel=1e-4), name
    else:
        assert ours["fid_0"] != pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)


def test_results_do_not_depend_on_batches_workers_or_order(two_folders, tmp_path, shapes_clip):
    features = feature_extractor("feature_spaces:sixteen_classes")
    metrics = ImageMetrics(features, clips={"shapes": shapes_clip}, shapes=True)
    real = RealImages(str(two_folders[1]), 32)
    first = evaluate(tmp_path / "1", FolderImages(two_folders[0], captions="embedded"), metrics, real)
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for i, file in enumerate(sorted(two_folders[0].iterdir(), key=lambda path: path.name[::-1])):
        (shuffled / f"{i}.png").write_bytes(file.read_bytes())
    other = FolderImages(shuffled, captions="embedded", batch_size=7, workers=1)
    second = evaluate(tmp_path / "2", other, metrics, RealImages(str(two_folders[1]), 32, batch_size=11))
    assert second == pytest.approx(first, rel=1e-6)
    assert {"is_mean", "fid_0", "fid_1", "fid_2", "kid_mean", "precision", "recall", "clip_score shapes"} < set(first)
    assert first["shapes_all"] == 1 and first["fid_0"] > 0.01


def test_inception_score_of_few_images_is_omitted(two_folders, tmp_path, caplog):
    """Splits of one image would make it 1, whatever they show."""
    few = FolderImages(two_folders[0])
    few.files, few.chunks = few.files[:12], [range(12)]
    results = results_of(few, ImageMetrics(feature_extractor("feature_spaces:sixteen_classes"), [0]), tmp_path)
    assert "is_mean" not in results and "IS is omitted: it needs at least 20 images, got 12" in caplog.text


def test_last_process_computes_the_results(two_folders, tmp_path, monkeypatch):
    """One process is done with the reference first and with the images last."""
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 15)
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    metrics, calls = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0]), []
    reference = RealImages(str(two_folders[1]), 32)

    class Overtaken(FolderImages):
        def read(self, piece):
            if not calls:
                calls.append(piece)
                assert (
                    evaluate(tmp_path / "out", FolderImages(two_folders[0]), metrics, reference, rank=1, world_size=2)
                    is None
                )
            return super().read(piece)

    assert evaluate(tmp_path / "out", Overtaken(two_folders[0]), metrics, reference, rank=0, world_size=2) is not None


def test_functions_are_imported_from_the_current_folder(tmp_path, monkeypatch, images):
    (tmp_path / "my_space.py").write_text("def means(images):\n    return images.mean((2, 3))\n")
    (tmp_path / "my_captioner.py").write_text("def none(images, captions):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(feature_extractor("my_space:means")(images), images.mean((2, 3)))
    assert load_captioner("my_captioner:none")(images, []) == []
    assert str(tmp_path) not in sys.path


def test_results_of_different_features_are_not_mixed(two_folders, tmp_path):
    ours, other = (
        ImageMetrics(feature_extractor(f"feature_spaces:{name}"), [0]) for name in ("patch_means", "sixteen_classes")
    )
    evaluate(tmp_path, FolderImages(two_folders[0]), ours)
    with pytest.raises(ValueError, match=r"computed with features=.*patch_means .*, not .*sixteen_classes"):
        evaluate(tmp_path, FolderImages(two_folders[0]), other)
    with pytest.raises(ValueError, match="computed with content="):
        evaluate(tmp_path, FolderImages(two_folders[1]), ours)


def test_stored_reference_gives_the_same_results(two_folders, tmp_path):
    ours, other = (
        ImageMetrics(feature_extractor(f"feature_spaces:{name}"), [0]) for name in ("patch_means", "sixteen_classes")
    )
    expected = evaluate(tmp_path / "1", FolderImages(two_folders[0]), ours, RealImages(str(two_folders[1]), 32))
    evaluate(tmp_path / "reference", FolderImages(two_folders[1]), ours)
    measured = FeatureStore(tmp_path / "reference/parts")
    results = evaluate(tmp_path / "2", FolderImages(two_folders[0]), ours, measured)
    assert results == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"reference .*parts was measured with features=.*patch_means"):
        evaluate(tmp_path / "3", FolderImages(two_folders[0]), other, measured)
    assert not (tmp_path / "3").exists()


def test_empty_shards_are_skipped(two_folders, tmp_path):
    """One of two shards holds no image: the reference consists of the images of the other."""
    for name, files in (("0", []), ("1", sorted(two_folders[1].iterdir()))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in files:
                tar.add(file, file.name)
    metrics = ImageMetrics(feature_extractor("feature_spaces:sixteen_classes"), [0])
    expected = evaluate(tmp_path / "a", FolderImages(two_folders[0]), metrics, RealImages(str(two_folders[1]), 32))
    shards = RealImages(str(tmp_path / "*.tar"), 32)
    assert evaluate(tmp_path / "b", FolderImages(two_folders[0]), metrics, shards) == pytest.approx(expected, rel=1e-6)
    collect(tmp_path / "c", shards, metrics, metrics.identity())
    store = FeatureStore(tmp_path / "c")
    assert len(store) == 30 and {"features_0", "logits"} < store.column_names()
    collect(
        tmp_path / "d", GeneratedImages(lambda captions, seeds: torch.empty(0), [], 0, {}), metrics, metrics.identity()
    )
    with pytest.raises(ValueError, match=r"reference must contain images, got none in .*d$"):
        evaluate(tmp_path / "e", FolderImages(two_folders[0]), metrics, FeatureStore(tmp_path / "d"))


def test_incomplete_reference_is_refused(two_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 10)
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    evaluate(tmp_path, FolderImages(two_folders[1]), metrics, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"reference .*parts is not finished"):
        evaluate(tmp_path / "new", FolderImages(two_folders[0]), metrics, FeatureStore(tmp_path / "parts"))


def test_class_accuracy_by_hand(tmp_path):
    """Two of three images are assigned to the class of their caption."""
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 1], images[2, 2] = 1.0, 1.0, 1.0

    def three_classes(images):
        means = images.mean((2, 3))
        return means, means

    metrics = ImageMetrics(Features(three_classes, "three"), [0], classes=["red", "green", "blue"])
    source = GeneratedImages(lambda captions, seeds: images, ["red", "green", "red"], 0, {})
    assert results_of(source, metrics, tmp_path / "1")["accuracy"] == pytest.approx(2 / 3)
    metrics.classes = ["crane", "green", "crane"]  # of ImageNet's classes some share a name
    source = GeneratedImages(lambda captions, seeds: images, ["crane", "green", "crane"], 0, {})
    assert results_of(source, metrics, tmp_path / "2")["accuracy"] == 1


def test_reference_is_measured_once(two_folders, tmp_path):
    calls = []

    class Counted(ImageMetrics):
        def __call__(self, images, captions):
            calls.append(len(images))
            return super().__call__(images, captions)

        def for_reference(self):
            return Counted(self.features, self.radii)

    metrics = Counted(feature_extractor("feature_spaces:patch_means"), [0])
    for run in "12":
        evaluate(tmp_path / run, FolderImages(two_folders[0]), metrics, RealImages(str(two_folders[1]), 32))
    assert sum(calls) == 24 + 30 + 24


def test_table_is_markdown():
    named = results_table([("a", {"fid_0": 2, "caps": 0.5, "psnr": 20})], "inception-clean", "blip").splitlines()[0]
    assert named == "| system | FID-0 ↓ (inception-clean) | CapS ↑ (blip) | PSNR ↑ |"
    assert results_table([("a|b", {"fid_0": 2})]).splitlines()[-1] == "| a\\|b | 2 |"
    rows = [("a", {"is_mean": 21.4321, "is_std": 0.5, "fid_0": 20.7}), ("b", {"fid_0": 1e-3})]
    assert results_table(rows) == (
        "| system | IS ↑ | FID-0 ↓ |\n| --- | --- | --- |\n| a | 21.43 ± 0.5 | 20.7 |\n| b | - | 0.001 |\n"
    )


def test_reference_of_some_files_is_measured_alone(two_folders, tmp_path):
    metrics = ImageMetrics(feature_extractor("feature_spaces:patch_means"), [0])
    files = {"003.png", "007.png", "011.png", "012.png"}
    reference = RealImages(str(two_folders[1]), 32, files=files)
    evaluate(tmp_path, FolderImages(two_folders[0]), metrics, reference)
    assert json.loads((tmp_path / "metrics.json").read_text())["protocol"]["reference"]["images"] == 4
    assert reference.identity != RealImages(str(two_folders[1]), 32).identity
    with pytest.raises(ValueError, match=r"must contain the images that the captions name, but lacks x\.png"):
        RealImages(str(two_folders[1]), 32, files={"003.png", "x.png"})

"""The papers' metrics, against torch-fidelity end to end, numpy, Pillow and values by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Call
from models import VQGAN_SIZES, make_vqgan
from PIL import Image, ImageFilter
from torch import Tensor

from clipgen.cli.evaluate import captions_from, parser
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset
from clipgen.evaluation import captions
from clipgen.evaluation import functional
from clipgen.evaluation.caps import load_captioner
from clipgen.evaluation.feature_store import FeatureStore, collect
from clipgen.evaluation.features import Features, clean_resize, feature_extractor, source_hash
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.metrics import blurred
from clipgen.evaluation.report import summary, table
from clipgen.evaluation.run import evaluate
from clipgen.evaluation.sources import FolderImages, GeneratedImages, RealImages, make_generate_fn
from clipgen.images import save_png, to_pil
from clipgen.models.lpips import MissingWeightsError
from clipgen.run_folder import vqgan_identity

fidelity = pytest.importorskip("torch_fidelity")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A randomly initialised Inception, saved as the published one is."""
    torch.manual_seed(0)
    from torch_fidelity import feature_extractor_inceptionv3 as published

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    kept, published.load_state_dict_from_url = published.load_state_dict_from_url, lambda *a, **k: {}
    strict = torch.nn.Module.load_state_dict
    try:
        torch.nn.Module.load_state_dict = lambda self, state, *a, **k: None
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        torch.nn.Module.load_state_dict, published.load_state_dict_from_url = strict, kept
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # else the features of so deep a network vanish
    torch.save(network.state_dict(), path)
    return path


def shapes_folder(folder, count: int, seed: int):
    """PNGs of shapes that carry their sentences."""
    folder.mkdir()
    data = ShapesDataset(count, seed=seed)
    for i, picture in enumerate(to_pil(data.render(range(count)))):
        save_png(picture, folder / f"{i:03d}.png", {"prompt": str(data.attributes[i])})
    return folder


@pytest.fixture(scope="session")
def two_folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    return shapes_folder(base / "a", 24, 1), shapes_folder(base / "b", 30, 2)


def some_features(images: Tensor) -> Tensor:
    """Means of 8 x 8 patches, 48 numbers."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


def sixteen_classes(images: Tensor) -> tuple[Tensor, Tensor]:
    found = some_features(images)
    return found, found[:, :16] * 3


# ------------------------------------------------------------------------------------------------------------- metrics


def test_frechet_distance_is_torch_fidelitys_and_scipys():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20)), rng.normal(size=(400, 20)) + 0.5
    ours = functional.frechet_distance(functional.moments(np.array_split(a, 7)), functional.moments([b]))
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    both = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    assert ours == pytest.approx(fid_statistics_to_metric(*both, False)["frechet_inception_distance"], rel=1e-6)
    root = scipy_linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    by_scipy = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert ours == pytest.approx(by_scipy, rel=1e-6)


def test_frechet_distance_of_two_known_gaussians():
    """Diagonal covariances: sum (m - m')^2 + (s - s')^2."""
    a = np.array([1.0, 2.0]), np.diag([4.0, 9.0])
    b = np.array([0.0, 4.0]), np.diag([1.0, 25.0])
    assert functional.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4)
    assert functional.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_moments_of_far_away_features_keep_their_digits():
    x = np.random.default_rng(0).normal(size=(100, 3)) + 1e6
    mean, covariance = functional.moments(np.array_split(x, 9))
    assert mean == pytest.approx(x.mean(0), rel=1e-12) and covariance == pytest.approx(np.cov(x.T), rel=1e-6)
    with pytest.raises(ValueError, match="at least two images on either side, got 1"):
        functional.moments([x[:1]])


def test_inception_score_by_hand():
    """Two classes, each image sure of one of them: exp(KL) = 2; all alike: 1."""
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(500, 1)
    mean, _ = functional.inception_score(sure)
    assert mean == pytest.approx(2, rel=1e-2)
    assert functional.inception_score(torch.zeros(100, 5))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        functional.inception_score(sure[:19])


def test_kernel_distance_by_its_formula():
    x, y = torch.randn(40, 6), torch.randn(40, 6) + 1
    k = lambda a, b: (a @ b.T / 6 + 1) ** 3
    off = lambda m: (m.sum() - m.trace()) / (40 * 39)
    expected = off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()  # fewer than 1000: every subset is the whole
    mean, spread = functional.kernel_distance(x, y)
    assert mean == pytest.approx(expected.item(), rel=1e-4) and spread == pytest.approx(0, abs=1e-4)


def test_precision_and_recall_of_sets_that_know_each_other():
    x = torch.randn(50, 4)
    assert functional.precision_recall(x, x) == (1, 1)
    assert (
        functional.precision_recall(x[:25] * 0.01, x)[1] < functional.precision_recall(x[:25] * 0.01, x)[0]
    )  # one mode
    with pytest.raises(ValueError, match="more than 3 images on either side, got 3"):
        functional.precision_recall(x[:3], x)


@pytest.mark.parametrize("sizes", [(4, 5, 3), (700, 1003, 16), (2002, 1500, 64)])
def test_precision_and_recall_are_torch_fidelitys(sizes):
    """Also where the last of several blocks holds fewer images than there are neighbours."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = torch.randn(sizes[0], sizes[2]), 1.1 * torch.randn(sizes[1], sizes[2]) + 0.1
    expected = prc_features_to_metric(a, b, save_cpu_ram=False, verbose=False)
    found = functional.precision_recall(a, b)
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_caption_score_is_the_geometric_mean():
    assert functional.caption_score(torch.tensor([0.5, 0.125]).log()) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="a caption with a token, got none"):
        functional.caption_score(torch.empty(0))


def test_blur_is_pillows(images):
    for radius in (1, 2):
        for ours, picture in zip(to_pil(blurred(images, radius)), to_pil(images)):
            assert np.array_equal(np.asarray(ours), np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))))
    assert blurred(images, 0) is images


# ------------------------------------------------------------------------------------------------------ feature spaces


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["inception", "inception-clean"])
def test_a_folder_has_torch_fidelitys_numbers(two_folders, inception_file, tmp_path, resize):
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


@pytest.mark.slow
def test_inception_by_a_file(inception_file, images):
    """The network's features are torch-fidelity's; the resizes are two spaces; a crafted file runs nothing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    plain, clean = (feature_extractor(f"{name}:{inception_file}") for name in ("inception", "inception-clean"))
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for ours, theirs in zip(plain.classify(images), network(pixels)):
        assert torch.equal(ours, theirs)
    assert plain.identity != clean.identity and not torch.allclose(plain(images), clean(images), rtol=1e-3)
    large = F.interpolate(images, (299, 299))  # nothing to resize: both agree
    assert torch.allclose(plain(large), clean(large), atol=1e-5)
    bad = inception_file.with_name("bad.pth")
    torch.save({"x": pytest.raises}, bad)
    with pytest.raises(ValueError, match="need torch-fidelity and its weights"):
        feature_extractor(f"inception:{bad}")


def test_the_clean_resize_is_pillows_on_floats(images):
    pixels = (images + 1) * 127.5
    ours = clean_resize(pixels, 61)
    for image, expected in zip(ours[:2], pixels[:2]):
        for channel, plane in zip(image, expected):
            resized = Image.fromarray(plane.numpy(), mode="F").resize((61, 61), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(resized).clip(0, 255) - channel.numpy()).max() < 0.01


def test_classifiers_of_torchvision_and_timm(tmp_path, images):
    import timm
    from torchvision.models import resnet18

    network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    features, logits = feature_extractor(f"torchvision:resnet18:{tmp_path / 'resnet.pth'}").classify(images)
    assert features.shape == (8, 512) and torch.allclose(network.fc(features), logits, atol=1e-5)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "timm.pth")
    features, logits = feature_extractor(f"timm:resnet10t:{tmp_path / 'timm.pth'}").classify(images)
    assert features.shape == (8, 512) and logits.shape == (8, 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "features must be inception"),
        ("torchvision:nothing", "nothing"),
        ("timm:nothing", "cannot be"),
        ("os:nothing", "has no attribute"),
        ("math:sqrt", "features 'math:sqrt' cannot be loaded"),
        ("inception:/nowhere.pth", "need torch-fidelity and its weights"),
    ],
)
def test_features_that_cannot_be_had(name, message):
    with pytest.raises(ValueError, match=message):
        feature_extractor(name)


def test_images_go_where_the_networks_are(images, shapes_clip):
    """Decoded pictures lie on the CPU; a space that is a network's method moves with its network."""
    seen = []

    def features(images):
        seen.append((images.device.type, len(images)))
        return torch.zeros(len(images), 1)

    measure = ImageMetrics(Features(features), [0], device="meta")
    for each in (measure, measure.for_reference()):
        each(images, [])
    assert seen[1:] == [("meta", 8)] * 2
    moved = Features(copy.deepcopy(shapes_clip).encode_image).to(torch.float64)
    assert moved.classify(images.double())[0].shape == (8, shapes_clip.embed_dim)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}


# -------------------------------------------------------------------------------------------------------- whole sets


def of(source, measure, folder, **options) -> dict[str, float]:
    collect(folder, source, measure, measure.identity(), **options)
    return summary(FeatureStore(folder))


def test_numbers_depend_on_neither_batches_nor_workers_nor_order(two_folders, tmp_path, shapes_clip):
    features = feature_extractor(f"{__name__}:sixteen_classes")
    measure = ImageMetrics(features, clips={"shapes": shapes_clip}, shapes=True)
    real = RealImages(str(two_folders[1]), 32)
    first = evaluate(tmp_path / "1", FolderImages(two_folders[0], captions="embedded"), measure, real)
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for i, file in enumerate(sorted(two_folders[0].iterdir(), key=lambda path: path.name[::-1])):
        (shuffled / f"{i}.png").write_bytes(file.read_bytes())
    other = FolderImages(shuffled, captions="embedded", batch_size=7, workers=1)
    second = evaluate(tmp_path / "2", other, measure, RealImages(str(two_folders[1]), 32, batch_size=11))
    assert second == pytest.approx(first, rel=1e-6)
    assert {"is_mean", "fid_0", "fid_1", "fid_2", "kid_mean", "precision", "recall", "clip_score shapes"} < set(first)
    assert first["shapes_all"] == 1 and first["fid_0"] > 0.01


def test_an_inception_score_of_few_images_is_left_out(two_folders, tmp_path, caplog):
    """Splits of one image would make it 1, whatever they show."""
    few = FolderImages(two_folders[0])
    few.files, few.chunks = few.files[:12], [range(12)]
    found = of(few, ImageMetrics(feature_extractor(f"{__name__}:sixteen_classes"), [0]), tmp_path)
    assert "is_mean" not in found and "IS is left out: it needs at least 20 images, got 12" in caplog.text


def test_pictures_of_several_sizes_are_mentioned_once(tmp_path, caplog):
    for name, size in (("a", (16, 16)), ("b", (16, 16)), ("c", (24, 20)), ("d", (20, 24))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    for image_size, mentioned in ((None, 1), (16, 0)):
        caplog.clear()
        source = FolderImages(tmp_path, image_size, workers=1)
        assert [images.shape for images, _ in source.read(source.chunks[0])] == [(4, 3, 16, 16)]
        found = [record.message.startswith("c.png is 24 x 20, and the first of") for record in caplog.records]
        assert found == [True] * mentioned
    caplog.clear()
    for name in "abcd":
        Image.new("RGB", (24, 20), "red").save(tmp_path / f"{name}.png")  # all alike, if not square
    source = FolderImages(tmp_path, workers=1)
    assert [images.shape for images, _ in source.read(source.chunks[0])] == [(4, 3, 20, 20)] and not caplog.records


def test_a_killed_evaluation_goes_on(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 6)
    prompts = [str(a) for a in ALL_ATTRIBUTES[:20]]
    measure = ImageMetrics(feature_extractor(f"{__name__}:some_features"), [0])
    asked = []

    def draw(captions, seeds):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(seeds)
        return make_generate_fn(pipe)(captions, seeds)

    source = lambda how: GeneratedImages(how, prompts, 5, {"model": "tiny"}, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "killed", source(draw), measure, measure.identity())
    assert [path.name for path in sorted((tmp_path / "killed").iterdir())] == ["identity.json", "part-000000.npz"]
    done = []
    collect(tmp_path / "killed", source(make_generate_fn(pipe)), measure, measure.identity(), advance=done.append)
    assert done[0] == 6 and sum(done) == 20  # what was there counts as done
    collect(tmp_path / "whole", source(make_generate_fn(pipe)), measure, measure.identity())
    for ours, theirs in zip(FeatureStore(tmp_path / "killed").parts, FeatureStore(tmp_path / "whole").parts):
        with np.load(ours) as a, np.load(theirs) as b:
            assert all(np.array_equal(a[name], b[name]) for name in b.files)


def test_processes_share_the_parts(two_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 10)
    measure = ImageMetrics(feature_extractor(f"{__name__}:some_features"), [0])
    source = FolderImages(two_folders[0])
    assert evaluate(tmp_path, source, measure, rank=1, world_size=2) is None
    assert len(FeatureStore(tmp_path / "parts").parts) == 1
    assert evaluate(tmp_path, source, measure, rank=0, world_size=2) is not None
    assert len(FeatureStore(tmp_path / "parts")) == 24


def test_whoever_is_last_compares(two_folders, tmp_path, monkeypatch):
    """One process is done with the reference first and with the images last."""
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 15)
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    measure, calls = ImageMetrics(feature_extractor(f"{__name__}:some_features"), [0]), []
    reference = RealImages(str(two_folders[1]), 32)

    class Overtaken(FolderImages):
        def read(self, piece):
            if not calls:
                calls.append(piece)
                assert (
                    evaluate(tmp_path / "out", FolderImages(two_folders[0]), measure, reference, rank=1, world_size=2) is None
                )
            return super().read(piece)

    assert evaluate(tmp_path / "out", Overtaken(two_folders[0]), measure, reference, rank=0, world_size=2) is not None


def test_functions_of_the_current_folder(tmp_path, monkeypatch, images):
    (tmp_path / "my_space.py").write_text("def means(images):\n    return images.mean((2, 3))\n")
    (tmp_path / "my_captioner.py").write_text("def none(images, captions):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(feature_extractor("my_space:means")(images), images.mean((2, 3)))
    assert load_captioner("my_captioner:none")(images, []) == []
    assert str(tmp_path) not in sys.path


def test_spaces_are_never_mixed(two_folders, tmp_path):
    ours, other = (
        ImageMetrics(feature_extractor(f"{__name__}:{name}"), [0]) for name in ("some_features", "sixteen_classes")
    )
    evaluate(tmp_path, FolderImages(two_folders[0]), ours)
    with pytest.raises(ValueError, match=r"was measured with features=.*some_features .*, not .*sixteen_classes"):
        evaluate(tmp_path, FolderImages(two_folders[0]), other)
    with pytest.raises(ValueError, match="was measured with pictures="):
        evaluate(tmp_path, FolderImages(two_folders[1]), ours)


def test_a_reference_that_was_measured_before(two_folders, tmp_path):
    ours, other = (
        ImageMetrics(feature_extractor(f"{__name__}:{n}"), [0]) for n in ("some_features", "sixteen_classes")
    )
    expected = evaluate(tmp_path / "1", FolderImages(two_folders[0]), ours, RealImages(str(two_folders[1]), 32))
    evaluate(tmp_path / "reference", FolderImages(two_folders[1]), ours)
    measured = FeatureStore(tmp_path / "reference/parts")
    found = evaluate(tmp_path / "2", FolderImages(two_folders[0]), ours, measured)
    assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"reference .*parts was measured with features=.*some_features"):
        evaluate(tmp_path / "3", FolderImages(two_folders[0]), other, measured)
    assert not (tmp_path / "3").exists()


def test_a_part_without_images_is_no_obstacle(two_folders, tmp_path):
    """Shards of which one holds no picture: the reference is what the other holds."""
    for name, files in (("0", []), ("1", sorted(two_folders[1].iterdir()))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in files:
                tar.add(file, file.name)
    measure = ImageMetrics(feature_extractor(f"{__name__}:sixteen_classes"), [0])
    expected = evaluate(tmp_path / "a", FolderImages(two_folders[0]), measure, RealImages(str(two_folders[1]), 32))
    shards = RealImages(str(tmp_path / "*.tar"), 32)
    assert evaluate(tmp_path / "b", FolderImages(two_folders[0]), measure, shards) == pytest.approx(expected, rel=1e-6)
    collect(tmp_path / "c", shards, measure, measure.identity())
    found = FeatureStore(tmp_path / "c")
    assert len(found) == 30 and {"features_0", "logits"} < found.column_names()
    collect(
        tmp_path / "d", GeneratedImages(lambda captions, seeds: torch.empty(0), [], 0, {}), measure, measure.identity()
    )
    with pytest.raises(ValueError, match=r"reference must hold images, got none in .*d$"):
        evaluate(tmp_path / "e", FolderImages(two_folders[0]), measure, FeatureStore(tmp_path / "d"))


def test_a_reference_that_is_not_finished_is_refused(two_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.evaluation.sources.IMAGES_PER_PART", 10)
    measure = ImageMetrics(feature_extractor(f"{__name__}:some_features"), [0])
    evaluate(tmp_path, FolderImages(two_folders[1]), measure, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"reference .*parts is not finished"):
        evaluate(tmp_path / "new", FolderImages(two_folders[0]), measure, FeatureStore(tmp_path / "parts"))


def test_damaged_parts_are_named(two_folders, tmp_path):
    measure = ImageMetrics(feature_extractor(f"{__name__}:some_features"), [0])
    evaluate(tmp_path, FolderImages(two_folders[0]), measure)
    part = tmp_path / "parts/part-000000.npz"
    for content in (part.read_bytes()[:300], b"", b"junk"):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-000000\.npz is damaged .* delete it"):
            evaluate(tmp_path, FolderImages(two_folders[0]), measure)
    part.unlink()
    assert evaluate(tmp_path, FolderImages(two_folders[0]), measure) is not None
    (tmp_path / "parts/identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json is damaged"):
        evaluate(tmp_path, FolderImages(two_folders[0]), measure)


def test_what_fails_before_its_first_part_binds_nobody(two_folders, tmp_path):
    (tmp_path / "other.txt").write_text("a user's own file")
    measure = ImageMetrics(shapes=True)
    with pytest.raises(ValueError, match="sentence must read like"):
        evaluate(tmp_path, FolderImages(two_folders[0], captions=[(None, "a cat")] * 24), measure)
    assert evaluate(tmp_path, FolderImages(two_folders[0], captions="embedded"), measure)["shapes_all"] == 1


def test_classes_that_a_classifier_recognises(tmp_path):
    """Two of three images are taken for what their sentences say."""
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 1], images[2, 2] = 1.0, 1.0, 1.0

    def three_classes(images):
        means = images.mean((2, 3))
        return means, means

    measure = ImageMetrics(Features(three_classes, "three"), [0], classes=["red", "green", "blue"])
    source = GeneratedImages(lambda captions, seeds: images, ["red", "green", "red"], 0, {})
    assert of(source, measure, tmp_path / "1")["accuracy"] == pytest.approx(2 / 3)
    measure.classes = ["crane", "green", "crane"]  # of ImageNet's classes some share a name
    source = GeneratedImages(lambda captions, seeds: images, ["crane", "green", "crane"], 0, {})
    assert of(source, measure, tmp_path / "2")["accuracy"] == 1


def test_a_reference_is_measured_once(two_folders, tmp_path):
    calls = []

    class Counted(ImageMetrics):
        def __call__(self, images, captions):
            calls.append(len(images))
            return super().__call__(images, captions)

        def for_reference(self):
            return Counted(self.features, self.radii)

    measure = Counted(feature_extractor(f"{__name__}:some_features"), [0])
    for run in "12":
        evaluate(tmp_path / run, FolderImages(two_folders[0]), measure, RealImages(str(two_folders[1]), 32))
    assert sum(calls) == 24 + 30 + 24


def test_reranking_takes_the_nearest_of_the_same_draws(pipe):
    captions = [str(a) for a in ALL_ATTRIBUTES[:3]]
    best = make_generate_fn(pipe, rerank_from=4)(captions, [0, 1, 2])
    text = pipe.clip.encode_text(captions)
    for i in range(3):
        four = pipe.generate(text[i : i + 1].expand(4, -1), [4 * i + j for j in range(4)])
        scores = pipe.clip.encode_image(four) @ text[i]
        assert torch.allclose(best[i], four[scores.argmax()], atol=1e-5)


def test_an_image_of_nan_is_refused(tmp_path):
    def draw(captions, seeds):
        images = torch.zeros(len(seeds), 3, 8, 8)
        images[-1, 0, 0, 0] = math.nan
        return images

    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity in an image of 'two'"):
        collect(tmp_path, GeneratedImages(draw, ["one", "two"], 0, {}), ImageMetrics(None), {})


MANY = 12_000  # images, of which features and logits are 72 MB, and torch-fidelity's probabilities 290 MB
LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
import torch_fidelity.metric_isc, torch_fidelity.metric_kid
from clipgen.evaluation.feature_store import FeatureStore
from clipgen.evaluation.report import summary

folder = FeatureStore(Path(sys.argv[1]))
torch.set_num_threads(1)
now = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (now + 150_000_000,) * 2)
print(*summary(folder, folder))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's memory by what it writes to")
def test_many_images_need_no_more_memory(tmp_path):
    rng = np.random.default_rng(0)
    for start in range(0, MANY, 500):
        rows = {"key": rng.integers(2**63, size=500).astype(np.uint64)}
        rows |= {"features_0": rng.standard_normal((500, 512), np.float32)}
        np.savez(tmp_path / f"part-{start:06d}.npz", **rows, logits=rng.standard_normal((500, 1000), np.float32))
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.stdout.split() == ["is_mean", "is_std", "fid_0", "kid_mean", "kid_std", "precision", "recall"], (
        found.stderr
    )
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npz"]


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    np.savez(tmp_path / "part-000000.npz", key=np.zeros(2, np.uint64), features_0=np.zeros((2, 4), np.float32))
    sizes = []

    def full(descriptor, start, size):
        sizes.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        FeatureStore(tmp_path).memmap_column("features_0", tmp_path)
    assert sizes == [32]


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "b.txt").write_text("1.png\ta cat\n")
    (tmp_path / "c.json").write_text(json.dumps(["a cat"]))
    (tmp_path / "d.json").write_text(json.dumps({"x/1.png": "a cat"}))
    coco = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A bus."}]}
    (tmp_path / "e.json").write_text(json.dumps(coco))
    read = lambda name: captions.read_captions(tmp_path / name)
    assert read("a.txt") == [(None, "a cat"), (None, "a dog")] and read("b.txt") == [("1.png", "a cat")]
    assert read("c.json") == [(None, "a cat")] and read("d.json") == [("x/1.png", "a cat")]
    assert read("e.json") == [("7.jpg", "A bus.")] and len(captions.read_captions("shapes")) == 288
    for name, content in (("f.json", "{"), ("g.json", '{"annotations": 3}'), ("h.txt", ""), ("i.json", '["a", " "]')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read(name)
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        read("nothing.txt")


def test_captions_as_windows_and_the_web_write_them(tmp_path):
    """A byte order mark, CRLF, line separators within a sentence, and tabs within one after a file's name."""
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\na\u2028dog\r\n".encode())
    (tmp_path / "b.txt").write_text("1.png\ta cat\ton a mat\n")
    (tmp_path / "c.JSON").write_bytes(b'\xef\xbb\xbf["a cat"]')
    assert captions.read_captions(tmp_path / "a.txt") == [(None, "a cat"), (None, "a\u2028dog")]
    assert captions.read_captions(tmp_path / "b.txt") == [("1.png", "a cat\ton a mat")]
    assert captions.read_captions(tmp_path / "c.JSON") == [(None, "a cat")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "1.png\ta cat\na dog\n", "must stand before every sentence, or before none"),
        ("a.txt", "1.png\ta cat\n2.png\t\n", "an empty one"),
        ("a.json", '[{"caption": "a cat"}]', "each sentence must be a text, got {'caption': 'a cat'}"),
        ("a.json", '{"1.png": ["a cat", "a pet"]}', "each sentence must be a text"),
        ("a.json", "[null]", "got None"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "caption": 3}]}',
            "got 3",
        ),
        ("a.json", '"a cat"', "a list, a mapping or COCO's layout"),
        ("a.json", "{}", "got none in"),
    ],
)
def test_what_is_no_sentence_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        captions.read_captions(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_empty_text_beside_a_picture_is_no_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(ValueError, match=r"a\.png holds none, and no a\.txt beside it does"):
        FolderImages(tmp_path, captions="embedded")
    (tmp_path / "a.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt must be a text in UTF-8"):
        FolderImages(tmp_path, captions="embedded")


def test_a_part_of_the_captions_or_all_in_turn():
    assert select(["a", "b"], 5, 0) == ["a", "b", "a", "b", "a"]
    some = select([str(i) for i in range(100)], 10, 1)
    assert some == select([str(i) for i in range(100)], 10, 1) and len(set(some)) == 10
    assert some == sorted(some, key=int) and some != select([str(i) for i in range(100)], 10, 2)


def test_captions_of_pictures(two_folders, tmp_path):
    folder = two_folders[0]
    source = FolderImages(folder, captions="embedded")
    assert source.captions == [str(a) for a in ShapesDataset(24, seed=1).attributes]
    by_name = [(f"{i:03d}.png", f"caption {i}") for i in reversed(range(24))]
    assert FolderImages(folder, captions=by_name).captions[3] == "caption 3"
    with pytest.raises(ValueError, match=r"none for 000\.png"):
        FolderImages(folder, captions=by_name[:5])
    with pytest.raises(ValueError, match="one a picture, got 2 for 24 pictures"):
        FolderImages(folder, captions=[(None, "a"), (None, "b")])
    Image.new("RGB", (8, 8)).save(tmp_path / "silent.png")
    with pytest.raises(ValueError, match=r"silent\.png holds none"):
        FolderImages(tmp_path, captions="embedded")


# ---------------------------------------------------------------------------------------------------------------- CapS


def test_blips_caption_score_is_the_formula(tmp_path, images):
    """A tiny BLIP: the product of the words' probabilities, one forward pass a word, without special tokens."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
    from transformers import BlipProcessor as Processor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "star", "ring"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), vocab_file=str(tmp_path / "vocab.txt"))
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = BlipConfig(
        text_config=dict(
            **small,
            vocab_size=11,
            max_position_embeddings=12,
            encoder_hidden_size=16,
            bos_token_id=5,
            sep_token_id=3,
            pad_token_id=0,
            eos_token_id=3,
            is_decoder=True,
            initializer_range=0.5,
        ),
        vision_config=dict(**small, image_size=32, patch_size=16, initializer_range=0.5),
        projection_dim=8,
    )
    model = BlipForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "blip")
    size = {"height": 32, "width": 32}
    Processor(BlipImageProcessor(size=size), tokenizer).save_pretrained(tmp_path / "blip")
    ours = load_captioner(f"blip:{tmp_path / 'blip'}")(images[:2], ["a red star", "a blue"])
    pixels = BlipImageProcessor(size=size)(to_pil(images[:2]), return_tensors="pt")["pixel_values"]
    for row, (image, ids) in enumerate(zip(pixels, ([6, 7, 9], [6, 8]))):
        product, before = 1.0, [5]
        for word in ids:
            with torch.no_grad():
                logits = model(pixel_values=image[None], input_ids=torch.tensor([before])).logits[0, -1]
            product *= logits.softmax(-1)[word].item()
            before.append(word)
        assert functional.caption_score(ours[row]) == pytest.approx(product ** (1 / len(ids)), rel=1e-4)
    blip = load_captioner(f"blip:{tmp_path / 'blip'}")
    known, unknown, long = blip(images[:1].repeat(3, 1, 1, 1), ["a red", "a zebra", "a " * 40])
    assert len(unknown) == 2 and known[0] == pytest.approx(unknown[0].item(), rel=1e-4) and len(long) == 12 - 2
    with pytest.raises(ValueError, match=r"a caption with a token, got none in '\\x00'"):
        ImageMetrics(captioner=blip)(images[:1], ["\x00"])
    other = load_captioner(f"blip:{tmp_path / 'blip'}")
    identities = [ImageMetrics(captioner=each, captioner_name="blip").identity() for each in (blip, other)]
    torch.nn.init.zeros_(next(other.model.parameters()))
    assert identities[0] == identities[1] != ImageMetrics(captioner=other, captioner_name="blip").identity()


def half_sure(images: Tensor, captions) -> list[Tensor]:
    """A captioner by hand: every word has probability 1 / 2, but "blue" 1 / 8."""
    return [torch.tensor([0.125 if word == "blue" else 0.5 for word in text.split()]).log() for text in captions]


def test_caption_score_of_a_set(tmp_path, images):
    source = GeneratedImages(lambda captions, seeds: images[: len(seeds)], ["a red", "a blue"], 0, {})
    measure = ImageMetrics(None, captioner=load_captioner(f"{__name__}:half_sure"))
    assert measure.identity()["captioner_source"] == source_hash(half_sure) == source_hash(sys.modules[__name__])
    found = of(source, measure, tmp_path)
    assert found == {"caps": pytest.approx((0.5 + 0.25) / 2)}
    with pytest.raises(ValueError, match=r"captioner 'blip:/nowhere' cannot be loaded .* go online once"):
        load_captioner("blip:/nowhere")


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def call(call):
    return partial(call, "clipgen-eval")


OFFLINE = ("--features", "clip:shapes", "--clip", "shapes", "--device", "cpu")


@pytest.mark.slow
def test_the_bundled_model(call, tmp_path):
    done = call(
        "--checkpoint",
        "shapes",
        "--captions",
        "shapes",
        "--reference",
        "shapes",
        "--shapes-eval",
        "--num-images",
        40,
        "--top-p",
        0.8,
        "--output",
        tmp_path / "out",
        *OFFLINE,
    )
    assert done.code == 0, done.stderr
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    assert content["metrics"]["shapes_all"] >= 0.9 and content["metrics"]["clip_score shapes"] > 80
    assert content["protocol"]["images"] == 40 and content["protocol"]["reference"]["images"] == 40
    assert content["protocol"]["features"].startswith("clip:shapes ")
    assert "| FID-0 ↓ (clip:shapes) |" in (tmp_path / "out/row.md").read_text() and "FID-0" in done.stdout


def test_a_folder_of_anybodys_pictures(call, two_folders, tmp_path):
    done = call(
        "--images",
        two_folders[0],
        "--reference",
        two_folders[1],
        "--shapes-eval",
        "--name",
        "another system",
        "--output",
        tmp_path / "out",
        *OFFLINE,
    )
    assert done.code == 0, done.stderr
    assert "| another system |" in done.stdout
    assert json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]["shapes_all"] == 1


def test_the_pictures_of_clipgen_sample(call, monkeypatch, capsys, tmp_path):
    """With the sentences that stand in them, and without the sheet beside them."""
    drawn = Call(
        monkeypatch,
        capsys,
        "clipgen-sample",
        "--checkpoint",
        "shapes",
        "--prompt",
        "a large red star on a white background",
        "--num-images",
        3,
        "--output",
        tmp_path / "in",
    )
    assert drawn.code == 0 and (tmp_path / "in/grid.png").is_file()
    done = call(
        "--images",
        tmp_path / "in",
        "--shapes-eval",
        "--features",
        "none",
        "--clip",
        "shapes",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]["images"] == 3


def test_a_tokenizers_reconstructions(call, two_folders, tiny_vqgan, tmp_path):
    tiny_vqgan.save(tmp_path / "vqgan")
    done = call(
        "--vqgan",
        tmp_path / "vqgan",
        "--reference",
        two_folders[0],
        "--output",
        tmp_path / "out",
        "--batch-size",
        7,
        *OFFLINE,
    )
    assert done.code == 0, done.stderr
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    found, protocol = content["metrics"], content["protocol"]
    assert protocol["vqgan"] == vqgan_identity(tiny_vqgan)
    assert protocol["features"] == feature_extractor("clip:shapes").identity
    images = torch.cat([batch for batch, _ in FolderImages(two_folders[0]).read(range(24))])
    with torch.no_grad():
        error = (tiny_vqgan(images).clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
    assert found["psnr"] == pytest.approx(-10 * error.log10().mean().item(), rel=1e-4)
    assert {"ssim", "rfid", "codebook_usage"} < set(found)


def test_a_tokenizer_of_the_perceptual_loss_where_its_weights_are_not(call, two_folders, tmp_path, monkeypatch):
    def missing(weights):
        raise MissingWeightsError("nowhere")

    for module in ("clipgen.evaluation.reconstruction", "clipgen.vqgan"):
        monkeypatch.setattr(f"{module}.load_lpips", missing)
    make_vqgan(**VQGAN_SIZES | {"perceptual_weight": 1.0}).save(tmp_path / "vqgan")
    done = call("--vqgan", tmp_path / "vqgan", "--reference", two_folders[0], "--output", tmp_path / "out", *OFFLINE)
    assert done.code == 0 and "LPIPS is left out" in done.stderr
    assert not {"lpips", "perceptual_loss"} & set(json.loads((tmp_path / "out/metrics.json").read_text())["metrics"])


def test_the_numbers_of_something_else_are_not_written_over(call, two_folders, tiny_vqgan, tmp_path):
    tiny_vqgan.save(tmp_path / "vqgan")
    tokenizer = ("--vqgan", tmp_path / "vqgan", "--output", tmp_path / "out", *OFFLINE)
    pictures = ("--images", two_folders[0], "--output", tmp_path / "out", *OFFLINE)
    assert call(*tokenizer, "--reference", two_folders[0]).code == 0
    before = (tmp_path / "out/metrics.json").read_text()
    assert call(*tokenizer, "--reference", two_folders[0]).code == 0  # the same again
    for arguments, what in (((*tokenizer, "--reference", two_folders[1]), "reference"), (pictures, "vqgan")):
        done = call(*arguments)
        assert done.code == 1 and f"out was measured with {what}=" in done.stderr, done.stderr
        assert (tmp_path / "out/metrics.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "shapes"), "give --captions or --classes"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--num-images", 1), "num_images must be at least 2, got 1"),
        (("--checkpoint", "shapes", "--captions", "nowhere.txt"), "existing file, got nowhere.txt"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--top-p", 1.3), "top_p must be in (0, 1], got 1.3"),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--captioner", "blip:/nowhere"),
            "captioner 'blip:/nowhere'",
        ),
        (("--checkpoint", "shapes", "--classes", "shapes", "--template", "A photo"), "a place for the class"),
        (("--images", "nowhere"), "root must be an existing folder"),
        (("--vqgan", "nowhere"), "give --reference"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--blur", -1), "blur must be radii of at least 0, got -1"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--image-size", 0), "image_size must be at least 1, got 0"),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--reference", "shapes", "--features", "none"),
            "in a space",
        ),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--clip", "none", "--features", "none"),
            "nothing to measure",
        ),
        (("--checkpoint", "shapes", "--classes", "shapes", "--shapes-eval"), "sentence must read like"),
    ],
)
def test_one_sentence(call, tmp_path, arguments, message):
    defaults = [part for pair in zip(OFFLINE[::2], OFFLINE[1::2]) if pair[0] not in arguments for part in pair]
    done = call(*arguments, "--output", "out", *defaults)
    assert done.code == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_changes_no_number_is_not_refused(call, two_folders, tmp_path):
    """The order of the radii, the size of batches, the name, the reference; another radius is."""
    arguments = (
        "--images",
        two_folders[0],
        "--output",
        tmp_path / "out",
        "--features",
        "clip:shapes",
        "--clip",
        "none",
        "--device",
        "cpu",
    )
    reference = ("--reference", two_folders[1])
    assert call(*arguments, *reference, "--blur", 0, 1).code == 0
    first = json.loads((tmp_path / "out/metrics.json").read_text())
    assert call(*arguments, *reference, "--blur", 1, 0, 1, "--batch-size", 7, "--name", "x").code == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == first
    done = call(*arguments, *reference, "--blur", 0)
    assert done.code == 1 and "was measured with radii=[0, 1], not [0]: name another" in done.stderr


def test_the_sentence_of_a_class(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"1.png": "cat", "2.png": "{dog}"}))
    args = parser().parse_args(
        ["--images", "x", "--classes", str(tmp_path / "classes.json"), "--template", "{a} {label}"]
    )
    assert captions_from(args) == [("1.png", "{a} cat"), ("2.png", "{a} {dog}")]


def test_one_picture_is_too_few(call, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "one/a.png")
    done = call(
        "--images",
        tmp_path / "one",
        "--reference",
        tmp_path / "one",
        "--clip",
        "none",
        "--features",
        "clip:shapes",
        "--output",
        tmp_path / "out",
    )
    assert done.code == 1 and "at least two images on either side, got 1" in done.stderr


def test_tables():
    named = table([("a", {"fid_0": 2, "caps": 0.5, "psnr": 20})], "inception-clean", "blip").splitlines()[0]
    assert named == "| system | FID-0 ↓ (inception-clean) | CapS ↑ (blip) | PSNR ↑ |"
    assert table([("a|b", {"fid_0": 2})]).splitlines()[-1] == "| a\\|b | 2 |"
    rows = [("a", {"is_mean": 21.4321, "is_std": 0.5, "fid_0": 20.7}), ("b", {"fid_0": 1e-3})]
    assert table(rows) == (
        "| system | IS ↑ | FID-0 ↓ |\n| --- | --- | --- |\n| a | 21.43 ± 0.5 | 20.7 |\n| b | - | 0.001 |\n"
    )

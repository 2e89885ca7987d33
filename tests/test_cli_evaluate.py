"""The command clipgen-eval."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Call
from models import VQGAN_SIZES, make_vqgan
from PIL import Image

from clipgen.checkpoint.vgg import MissingWeightsError
from clipgen.cli.evaluate import captions_from, make_metrics, reference_source
from clipgen.cli.evaluate_args import check_arguments, check_paths, complete_arguments, make_parser
from clipgen.data.class_names import NAME_LISTS
from clipgen.evaluation.captions import Caption
from clipgen.evaluation.features import feature_extractor
from clipgen.evaluation.sources import FolderImages, RealImages
from clipgen.tokenizer_identity import vqgan_identity

pytest.importorskip("torch_fidelity")
pytestmark = pytest.mark.usefixtures("reference_cache")


RECONSTRUCTED = ("--features", "clip:shapes", "--device", "cpu")
OFFLINE = (*RECONSTRUCTED, "--clip", "shapes")


@pytest.fixture
def call(call):
    return partial(call, "clipgen-eval")


@pytest.mark.slow
def test_metrics_of_the_bundled_model_are_written_with_their_protocol(call, tmp_path):
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


def test_folder_is_evaluated_under_its_name(call, two_folders, tmp_path):
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


def test_images_of_clipgen_sample_carry_their_captions(call, monkeypatch, capsys, tmp_path):
    """With the captions in their metadata, and without the grid beside them."""
    sampled = Call(
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
    assert sampled.code == 0 and (tmp_path / "in/grid.png").is_file()
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


def test_tokenizer_metrics_match_direct_computation(call, two_folders, tiny_vqgan, tmp_path):
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
        *RECONSTRUCTED,
    )
    assert done.code == 0, done.stderr
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    results, protocol = content["metrics"], content["protocol"]
    assert protocol["vqgan"] == vqgan_identity(tiny_vqgan)
    assert protocol["features"] == feature_extractor("clip:shapes").identity
    images = torch.cat([batch for batch, _ in FolderImages(two_folders[0]).read(range(24))])
    with torch.no_grad():
        error = (tiny_vqgan(images).clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
    assert results["psnr"] == pytest.approx(-10 * error.log10().mean().item(), rel=1e-4)
    assert {"ssim", "rfid", "codebook_usage"} < set(results)


def test_lpips_is_omitted_without_vgg_weights(call, two_folders, tmp_path, monkeypatch):
    def missing(weights):
        raise MissingWeightsError("nowhere")

    for module in ("clipgen.evaluation.reconstruction", "clipgen.vqgan"):
        monkeypatch.setattr(f"{module}.load_lpips", missing)
    make_vqgan(**VQGAN_SIZES | {"perceptual_weight": 1.0}).save(tmp_path / "vqgan")
    done = call(
        "--vqgan", tmp_path / "vqgan", "--reference", two_folders[0], "--output", tmp_path / "out", *RECONSTRUCTED
    )
    assert done.code == 0 and "LPIPS is omitted" in done.stderr
    assert not {"lpips", "perceptual_loss"} & set(json.loads((tmp_path / "out/metrics.json").read_text())["metrics"])


def test_results_of_another_protocol_are_not_overwritten(call, two_folders, tiny_vqgan, tmp_path):
    tiny_vqgan.save(tmp_path / "vqgan")
    tokenizer = ("--vqgan", tmp_path / "vqgan", "--output", tmp_path / "out", *RECONSTRUCTED)
    images = ("--images", two_folders[0], "--output", tmp_path / "out", *OFFLINE)
    assert call(*tokenizer, "--reference", two_folders[0]).code == 0
    before = (tmp_path / "out/metrics.json").read_text()
    assert call(*tokenizer, "--reference", two_folders[0]).code == 0  # the same again
    for arguments, what in (((*tokenizer, "--reference", two_folders[1]), "reference"), (images, "vqgan")):
        done = call(*arguments)
        assert done.code == 1 and f"out contains results computed with {what}=" in done.stderr, done.stderr
        assert (tmp_path / "out/metrics.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "shapes"), "give --captions or --classes"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--num-images", 1), "num_images must be at least 2, got 1"),
        (("--checkpoint", "shapes", "--captions", "nowhere.txt"), "existing file or a folder, got nowhere.txt"),
        (("--checkpoint", "shapes", "--classes", "nowhere.txt"), "existing file, got nowhere.txt"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--top-p", 1.3), "top_p must be in (0, 1], got 1.3"),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--captioner", "blip:/nowhere"),
            "captioner 'blip:/nowhere'",
        ),
        (("--checkpoint", "shapes", "--classes", "shapes", "--template", "A photo"), "template must contain {label}"),
        (("--images", "nowhere"), "error: --images must be an existing folder of images, got nowhere"),
        (("--images", ".", "--top-k", 5), "top_k applies to --checkpoint only: leave out --top-k"),
        (("--images", ".", "--rerank-from", 4), "rerank_from applies to --checkpoint only"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--classes", "shapes"), "give --captions or --classes"),
        (("--vqgan", "shapes", "--reference", "shapes", "--clip", "shapes"), "leave out --clip"),
        (("--vqgan", "shapes", "--reference", "shapes", "--captions", "shapes"), "leave out --captions"),
        (("--vqgan", "nowhere"), "give --reference"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--blur", -1), "blur must be radii of at least 0, got -1"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--image-size", 0), "image_size must be at least 1, got 0"),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--reference", "shapes", "--features", "none"),
            "in a feature space",
        ),
        (
            ("--checkpoint", "shapes", "--captions", "shapes", "--clip", "none", "--features", "none"),
            "nothing to measure",
        ),
        (("--checkpoint", "shapes", "--classes", "shapes", "--shapes-eval"), "caption must read like"),
    ],
)
def test_errors_are_one_line(call, tmp_path, arguments, message):
    offline = RECONSTRUCTED if "--vqgan" in arguments else OFFLINE
    defaults = [part for pair in zip(offline[::2], offline[1::2]) if pair[0] not in arguments for part in pair]
    done = call(*arguments, "--output", "out", *defaults)
    assert done.code == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_that_change_no_result_are_not_refused(call, two_folders, tmp_path):
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
    assert done.code == 1 and "computed with radii=[0, 1], not [0]; choose another output folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--images", ".", "--num-images", 5), "num_images"),
        (("--images", ".", "--seed", 0), "seed"),
        (("--images", ".", "--captions", "a.txt", "--template", "A photo of a {label}."), "template"),
        (("--checkpoint", "shapes", "--captions", "shapes", "--split", "all"), "split"),
        (("--checkpoint", "shapes", "--classes", "a.txt", "--split", "all"), "split"),
        (("--images", ".", "--features", "none", "--clip", "shapes", "--blur", 0), "blur"),
        (("--images", ".", "--whole-reference"), "whole_reference"),
        (("--vqgan", "shapes", "--reference", ".", "--num-images", 5), "num_images"),
        (("--vqgan", "shapes", "--reference", ".", "--seed", 1), "seed"),
        (("--vqgan", "shapes", "--reference", ".", "--blur", 0), "blur"),
        (("--vqgan", "shapes", "--reference", ".", "--whole-reference"), "whole_reference"),
    ],
)
def test_options_without_effect_are_refused(arguments, name):
    args = make_parser().parse_args(list(map(str, arguments)))
    option = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{name} has an effect only with .*: leave out --{option}"):
        check_arguments(args)


def test_options_that_are_not_given_have_the_papers_values():
    args = make_parser().parse_args(["--checkpoint", "shapes", "--captions", "shapes", "--seed", "0"])
    check_arguments(args)
    complete_arguments(args)
    settings = (args.num_images, args.seed, args.template, args.blur)
    assert settings == (30_000, 0, "A photo of a {label}.", [0, 1, 2])


def test_number_of_rendered_images_of_a_tokenizer_is_limited(call, tiny_vqgan, tmp_path):
    vqgan = tiny_vqgan.save(tmp_path / "vqgan")
    options = ("--vqgan", vqgan, "--reference", "shapes", "--num-images", 6, "--output", tmp_path / "out")
    assert call(*options, *RECONSTRUCTED).code == 0
    protocol = json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
    assert protocol["reference"] == RealImages("shapes", 32, count=6).identity


def test_tokenizer_is_evaluated_by_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a tokenizer is evaluated by one process, got 2"):
        check_arguments(make_parser().parse_args(["--vqgan", "shapes", "--reference", "shapes"]))


def test_other_classes_than_the_classifiers_are_warned_about(small_classifier, two_folders, tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("cat\ndog\nship\n")
    features = f"classifier:{small_classifier}"
    options = ["--images", str(two_folders[0]), "--classes", str(tmp_path / "classes.txt"), "--features", features]
    args = make_parser().parse_args([*options, "--clip", "none", "--device", "cpu"])
    complete_arguments(args)
    assert make_metrics(args, True).classes == []
    assert f'"recognized" is omitted: --classes has 3 names, {features} 2 classes' in caplog.text


def test_template_of_the_classes(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"1.png": "cat", "2.png": "{dog}"}))
    args = make_parser().parse_args(
        ["--images", "x", "--classes", str(tmp_path / "classes.json"), "--template", "{a} {label}"]
    )
    assert captions_from(args) == [("1.png", "{a} cat"), ("2.png", "{a} {dog}")]


@pytest.mark.parametrize(("count", "omitted"), [(1, {"fid_0", "kid_mean", "precision"}), (3, {"precision"})])
def test_metrics_that_need_more_images_are_omitted(call, tmp_path, caplog, count, omitted):
    """The other results are written, and not lost at the last step."""
    for number in range(count):
        Image.new("RGB", (32, 32), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a large red ring on a white background")
    options = ("--images", tmp_path, "--reference", tmp_path, "--blur", 0, "--output", tmp_path / "out")
    done = call(*options, "--clip", "shapes", "--features", "clip:shapes")
    assert done.code == 0, done.stderr
    results = json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]
    assert {"fid_0", "kid_mean", "precision"} - set(results) == omitted and "clip_score shapes" in results
    assert f"precision and recall omitted: at least 4 images are needed on either side, got {count}" in caplog.text


@pytest.mark.parametrize(("options", "count"), [((), 6), (("--whole-reference",), 30)])
def test_reference_holds_the_images_of_the_selected_captions(call, two_folders, tmp_path, options, count):
    """As in the papers: of a folder with more images, those that the selected captions describe."""
    text = "a large red star on a white background"
    captions = {f"{number:03d}.png": text for number in range(12)}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    done = call(
        *("--checkpoint", "shapes", "--captions", tmp_path / "captions.json", "--num-images", 6),
        *("--reference", two_folders[1], "--output", tmp_path / "out", *options, *OFFLINE),
    )
    assert done.code == 0, done.stderr
    protocol = json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
    assert protocol["images"] == 6
    assert protocol["reference"]["images"] == count


def five_captions_each(path, count):
    """Write captions in COCO's layout: five of each of ``count`` images."""
    images = [{"id": number, "file_name": f"{number:03d}.png"} for number in range(count)]
    annotations = []
    for number in range(count):
        for shape in ("ring", "star", "cross", "heart", "square"):
            annotations.append({"image_id": number, "caption": f"a large red {shape} on a white background"})
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_reference_holds_as_many_images_as_are_generated(call, two_folders, tmp_path, caplog):
    """Of images with five captions each, as in COCO: N captions are those of N images."""
    captions = five_captions_each(tmp_path / "coco.json", 30)
    options = ("--reference", two_folders[1], "--output", tmp_path / "out", *OFFLINE)
    done = call("--checkpoint", "shapes", "--captions", captions, "--num-images", 20, *options)
    assert done.code == 0, done.stderr
    assert "Images: 20, reference: 20 images" in done.stdout and "are compared with" not in caplog.text
    protocol = json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
    assert protocol["images"] == 20 and protocol["reference"]["images"] == 20
    selected = (tmp_path / "out/captions.txt").read_text().splitlines()
    assert len({line.split("\t")[0] for line in selected}) == 20


@pytest.mark.parametrize(("options", "count"), [((), 24), (("--whole-reference",), 30)])
def test_reference_of_a_folder_holds_the_images_that_it_shows(call, two_folders, tmp_path, caplog, options, count):
    """Another system, asked for the same captions, is compared with the same images."""
    captions = five_captions_each(tmp_path / "coco.json", 30)
    names = ("--images", two_folders[0], "--captions", captions, "--reference", two_folders[1])
    done = call(*names, *options, "--output", tmp_path / "out", *OFFLINE)
    assert done.code == 0, done.stderr
    protocol = json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
    assert protocol["images"] == 24 and protocol["reference"]["images"] == count
    assert ("24 images are compared with 30 of the reference" in caplog.text) == (count == 30)


def test_reference_with_other_file_names_is_used_whole(tmp_path, two_folders, caplog):
    (tmp_path / "theirs").mkdir()
    for number in range(3):
        (tmp_path / f"theirs/picture{number}.png").touch()
    names = [Caption(f"picture{number}.png", "a dog") for number in range(3)]
    args = make_parser().parse_args(["--images", str(tmp_path / "theirs"), "--reference", str(two_folders[1])])
    assert reference_source(args, 32, names).dataset.count_images().images == 30
    assert "The captions name no image of the reference" in caplog.text


def test_images_are_scored_with_all_of_their_captions(call, two_folders, tmp_path, shapes_clip):
    """The mean over all pairs, where images have different numbers of captions: the threshold of Table 2."""
    texts = ["a large red star on a white background", "a small blue ring on a black background"]
    annotations = []
    for number in range(24):
        for text in texts[: 1 + number % 2]:
            annotations.append({"image_id": number, "caption": text})
    images = [{"id": number, "file_name": f"{number:03d}.png"} for number in range(30)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    options = ["--images", two_folders[0], "--captions", tmp_path / "coco.json", "--clip", "shapes"]
    done = call(*options, "--all-captions", "--features", "none", "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    results = json.loads((tmp_path / "out/metrics.json").read_text())
    pictures = shapes_clip.encode_image(torch.cat([batch for batch, _ in FolderImages(two_folders[0]).read(range(24))]))
    cosines = pictures @ shapes_clip.encode_text(texts).T
    expected = 100 * torch.cat([cosines[:, 0], cosines[1::2, 1]]).mean().item()
    assert results["protocol"]["images"] == 36
    assert results["metrics"]["clip_score shapes"] == pytest.approx(expected, abs=0.1)
    done = call(*options, "--all-captions", "--output", tmp_path / "other", "--features", "clip:shapes")
    assert done.code == 1 and "all_captions must be used with --images, --captions and --features none" in done.stderr


def test_classes_may_be_those_of_imagenet():
    args = make_parser().parse_args(["--images", "x", "--classes", "imagenet"])
    complete_arguments(args)
    assert captions_from(args)[0] == (None, "A photo of a tench.")


PROMPT_SOURCES = [("--captions", "texts"), *(("--classes", name) for name in ("shapes", *NAME_LISTS))]


@pytest.mark.parametrize("source", PROMPT_SOURCES)
def test_every_source_of_prompts_passes_the_early_check(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()  # a text file per image, as in CUB-200-2011
    check_paths(make_parser().parse_args(["--checkpoint", "shapes", *source]))

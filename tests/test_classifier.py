"""The classifier that evaluates generated images: its training resumes, its file is checked, its error is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import recognize
import torch
import train_classifier

from clipgen.cli.evaluate import classifier_note
from clipgen.evaluation.classifier import ImageClassifier, load_classifier, shifted
from clipgen.evaluation.features import feature_extractor
from clipgen.generation.file_names import underscored
from clipgen.images import psnr, rounded
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

CLASSES = 2


def settings(shards: Path, epochs: int = 2) -> train_classifier.Settings:
    return train_classifier.Settings(epochs, 8, 1, 32, 0, (8, 8, 8), train_classifier.shard_sizes(shards))


@pytest.fixture
def shards(labeled_shards) -> Path:
    return labeled_shards


@pytest.fixture
def trained(small_classifier) -> Path:
    return small_classifier


def test_interrupted_training_resumes_with_the_same_result(shards, tmp_path, monkeypatch):
    uninterrupted = train_classifier.train(settings(shards), shards, CLASSES, tmp_path / "whole")
    train_epoch = train_classifier.Training.train_epoch
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_classifier.Training, "train_epoch", interrupted_after_one_epoch(train_epoch))
        train_classifier.train(settings(shards), shards, CLASSES, tmp_path / "parts")
    resumed = train_classifier.train(settings(shards), shards, CLASSES, tmp_path / "parts")
    assert resumed["accuracy"] == uninterrupted["accuracy"]
    states = [load_classifier(tmp_path / name / "classifier.pt")[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def interrupted_after_one_epoch(train_epoch):
    def interrupted(training, data):
        if training.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(training, data)

    return interrupted


def test_checkpoint_of_other_settings_is_refused(shards, tmp_path):
    train_classifier.train(settings(shards, epochs=1), shards, CLASSES, tmp_path)
    with pytest.raises(ValueError, match="must be of the same settings"):
        train_classifier.train(settings(shards, epochs=2), shards, CLASSES, tmp_path)


def test_file_states_the_accuracy_and_its_interval(trained):
    _, about = load_classifier(trained)
    accuracy = about["accuracy"]
    low, high = accuracy["interval"]
    assert accuracy["images"] == 8 and low <= accuracy["all"] <= high
    assert about["trained"]["held_out_shards"] == ["train-000001.tar"]


def test_first_layer_whitens_the_patches(shards):
    images = train_classifier.load_images([shards / "train-000000.tar"], 32).floats(slice(None))
    classifier = ImageClassifier(CLASSES)
    train_classifier.initialize_whitening(classifier, images)
    classifier.whitening.bias.data.zero_()
    responses = classifier.whitening((images - classifier.mean) / classifier.std)[:, :12].transpose(0, 1).flatten(1)
    second_moments = responses @ responses.T / responses.shape[1]
    assert torch.allclose(second_moments, torch.eye(12), atol=0.05)


def test_translated_images_are_shifted_by_at_most_two_pixels():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    results = train_classifier.translated(image.expand(200, 1, 8, 8), torch.Generator().manual_seed(0))
    centers = results[:, 0, 4, 4]
    expected = {8 * y + x for y in range(2, 7) for x in range(2, 7)}
    assert set(centers.int().tolist()) == expected


def test_shifted_views_move_along_the_diagonal():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    both = image.repeat(2, 1, 1, 1)
    result = shifted(both, torch.tensor([[1, 1], [-1, 2]]))
    assert result[0, 0, 3, 3] == image[0, 0, 4, 4]
    assert result[1, 0, 3, 3] == image[0, 0, 2, 5]
    assert result[1, 0, 0, 3] == image[0, 0, 1, 5]  # mirrored
    assert shifted(image, torch.zeros(1, 2, dtype=torch.int64)) is image


def test_mirrored_image_has_the_same_prediction(trained, images):
    classifier, _ = load_classifier(trained)
    assert torch.equal(classifier.predict(images), classifier.predict(images.flip(-1)))


def test_classifier_is_a_feature_space_of_the_evaluation(trained, images):
    features = feature_extractor(f"classifier:{trained}")
    hidden, logits = features.features_and_logits(images)
    classifier, _ = load_classifier(trained)
    assert hidden.shape == (8, 8) and torch.equal(logits.argmax(dim=1), classifier.predict(images))
    assert features.num_classes == CLASSES and features.identity.startswith("classifier ")


def test_images_of_another_size_are_resized_to_that_of_the_training(trained, images):
    features = feature_extractor(f"classifier:{trained}")
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert features.identity.endswith(" 32 px")
    resized = torch.nn.functional.interpolate(enlarged, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    for of_enlarged, of_resized in zip(features.features_and_logits(enlarged), features.features_and_logits(resized)):
        assert torch.allclose(of_enlarged, of_resized)
    classifier, _ = load_classifier(trained)
    enlarged_features = recognize.features_of(classifier, enlarged)
    assert torch.allclose(enlarged_features, recognize.features_of(classifier, resized))


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_classifier(tmp_path / "missing.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="with other content"):
        load_classifier(tmp_path / "other.pt")


def test_script_measures_real_images_without_a_model(shards, trained, tmp_path, monkeypatch, capsys):
    options = ["--data", str(shards), "--classifier", str(trained), "--per-class", "4", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["recognize.py", *options])
    recognize.main()
    report = json.loads((tmp_path / "recognized.json").read_text())
    assert list(report["rows"]) == ["real images"] and report["rows"]["real images"]["images"] == 8
    assert "| real images | 8 |" in (tmp_path / "recognized.md").read_text() == capsys.readouterr().out[:-1]
    before = (tmp_path / "recognized.md").read_bytes()
    monkeypatch.setattr(recognize, "shard_sizes", lambda data: ["others"])
    recognize.main()
    assert 'no row "real images": it was trained on other shards' in capsys.readouterr().err
    second = tmp_path.with_name(f"{tmp_path.name}-2")
    assert second.is_dir()
    assert (tmp_path / "recognized.md").read_bytes() == before


def test_evaluation_states_the_accuracy_of_the_classifier(trained):
    _, about = load_classifier(trained)
    note = classifier_note(f"classifier:{trained}")
    assert f"The accuracy of the classifier is {about['accuracy']['all']:.1%} (" in note and "on 8 real" in note
    assert classifier_note("clip:shapes") == ""


def test_script_refuses_a_template_without_the_class(shards, trained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recognize.py", "--data", str(shards), "--template", "a photo"])
    with pytest.raises(SystemExit, match=r"--template must contain \{label\}, got 'a photo'"):
        recognize.main()


def test_table_states_the_classifiers_error_and_the_floor(shards, trained):
    classifier, about = load_classifier(trained)
    real = recognize.held_out_images(shards, 32, 100, about)
    reference = recognize.features_of(classifier, real.floats(slice(None)))
    row = recognize.describe(classifier, real.floats(slice(None)), real.labels, reference)
    assert row["fid"] == pytest.approx(0, abs=1e-6) and row["precision"] == row["recall"] == 1
    text = recognize.table({"real images": row}, about)
    assert f"The accuracy of the classifier is {about['accuracy']['all']:.1%}" in text and "| real images | 8 |" in text


def test_images_of_other_shards_are_no_floor(shards, trained, tmp_path):
    """The classifier may have been trained on them."""
    _, about = load_classifier(trained)
    other = shutil.copytree(shards, tmp_path / "shards")
    first = min(other.glob("train-*.tar"))
    first.rename(first.with_name("train-900000.tar"))
    assert recognize.held_out_images(other, 32, 100, about) is None


def test_class_kept_counts_only_images_that_are_recognized_themselves():
    class ByBrightness:
        def predict(self, images: torch.Tensor) -> torch.Tensor:
            return (images.mean(dim=(1, 2, 3)) > 0).long()

    originals = torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5]).view(5, 1, 1, 1)
    reconstructed = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.5]).view(5, 1, 1, 1)
    labels = torch.tensor([1, 1, 1, 0, 1])
    # the last original is not recognized; of the other four, the third loses its class
    assert recognize.class_kept(ByBrightness(), originals, reconstructed, labels) == 0.75


def test_script_measures_reconstructions(shards, trained, tiny_vqgan, tmp_path, monkeypatch, capsys):
    vqgan = tiny_vqgan.save(tmp_path / "vqgan")
    options = ["--data", shards, "--classifier", trained, "--vqgan", vqgan, "--output", tmp_path / "report"]
    monkeypatch.setattr("sys.argv", ["recognize.py", *map(str, options)])
    recognize.main()
    report = json.loads((tmp_path / "report" / "recognized.json").read_text())
    images = train_classifier.load_images(sorted(shards.glob("val-*.tar")), 32).floats(slice(None))
    with torch.no_grad():
        reconstructed = rounded(tiny_vqgan(images))
    row = report["rows"][f"{vqgan}: reconstructions"]
    assert row["psnr"] == pytest.approx(psnr(images, reconstructed).mean().item(), abs=1e-4)
    assert row["images"] == len(images) and 0 <= row["class_kept"] <= 1
    assert f"| {row['class_kept']:.1%} | {row['psnr']:.2f} dB |" in capsys.readouterr().out


def test_script_compares_runs_at_their_own_sampling_parameters(shards, trained, pipe, tmp_path, monkeypatch):
    runs = []
    for name, params in (("greedy", SamplingParams(top_k=1)), ("cold", SamplingParams(temperature=0.5))):
        model = TextToImage(pipe.vqgan, pipe.transformer, pipe.clip, params=params)
        runs.append(str(model.save(tmp_path / name)))
    options = ["--data", shards, "--classifier", trained, "--per-class", 2, "--output", tmp_path / "report"]
    monkeypatch.setattr("sys.argv", ["recognize.py", *map(str, options), "--top-p", "0.9", "--checkpoint", *runs])
    recognize.main()
    rows = json.loads((tmp_path / "report" / "recognized.json").read_text())["rows"]
    assert list(rows) == ["real images", *runs]
    settings = [(row["settings"]["top_k"], row["settings"]["temperature"]) for row in map(rows.get, runs)]
    assert settings == [(1, 1.0), (300, 0.5)] and {rows[run]["settings"]["top_p"] for run in runs} == {0.9}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {
        f"grid_{underscored(run).strip('_')}.png" for run in runs
    }
    table = (tmp_path / "report" / "recognized.md").read_text()
    assert (
        f"| {runs[0]} (top_k 1, top_p 0.9) | 4 |" in table and f"| {runs[1]} (temperature 0.5, top_p 0.9) | 4" in table
    )

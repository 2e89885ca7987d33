"""The model card of a saved pipeline, and what it does not publish."""

from __future__ import annotations

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from clipgen import TextToImage
from clipgen.model_card import CardDetails


def test_model_card_reports_the_training_settings(pipe, tmp_path):
    """They are kept when a pipeline is saved again. Paths of all systems are omitted."""
    run = pipe.save(tmp_path / "run")
    paths = {"root": "/home/me/photos", "val_root": r"C:\Users\me\photos", "cache_dir": None}
    data = {"_target_": "clipgen.data.folder.folder_data", "batch_size": 8, **paths}
    config = {"seed": 0, "data": data, "trainer": {"max_steps": 500, "precision": "bf16-mixed"}}
    (run / "config.yaml").write_text(json.dumps(config))
    once = TextToImage.load(run).save(tmp_path / "once")
    twice = TextToImage.load(once).save(tmp_path / "twice")
    card = (twice / "README.md").read_text()
    assert "| data | batch_size | 8 |" in card and "| trainer | max_steps | 500 |" in card and "photos" not in card
    assert not (pipe.save(twice) / "training.json").exists()


def test_model_card_names_the_dataset_of_the_run(pipe, tmp_path):
    run = pipe.save(tmp_path / "run")
    (run / "config.yaml").write_text(json.dumps({"data": {"dataset": "uoft-cs/cifar10", "cache_dir": "me/cache"}}))
    once = TextToImage.load(run).save(tmp_path / "once")
    twice = TextToImage.load(once).save(tmp_path / "twice")
    card = (twice / "README.md").read_text()
    assert ModelCard(card).data.datasets == ["uoft-cs/cifar10"] and "Its training data: uoft-cs/cifar10." in card
    assert "| data | dataset | uoft-cs/cifar10 |" in card and "me/cache" not in card
    named = TextToImage.load(run).save(tmp_path / "named", card=CardDetails(datasets=["me/other"]))
    assert ModelCard((named / "README.md").read_text()).data.datasets == ["me/other"]


@pytest.mark.parametrize("dataset", ["/home/me/photos", "photos/*.parquet", "a/b/c", "me/photos"])
def test_local_datasets_are_not_published(pipe, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "photos").mkdir(parents=True)
    run = pipe.save(tmp_path / "run")
    (run / "config.yaml").write_text(json.dumps({"data": {"dataset": dataset, "batch_size": 8}}))
    card = (TextToImage.load(run).save(tmp_path / "once") / "README.md").read_text()
    assert "| data | batch_size | 8 |" in card and dataset not in card


def test_model_card_names_license_data_samples_and_results(pipe, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"metrics": {"fid": 12.3456, "caps_mean": 0.25}, "protocol": {}}))
    prompts = ["a large blue ring on a white background", "a | b"]
    card = CardDetails(
        license="mit", datasets=["me/rings"], language="en", prompts=prompts, results=metrics, evaluated_on="me/test"
    )
    pipe.save(tmp_path / "pipe", card=card)
    text = (tmp_path / "pipe" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["me/rings"])
    assert {"clip-gen", "vqgan"} <= set(data.tags)
    assert [(entry.metric_type, entry.metric_value) for entry in data.eval_results] == [
        ("fid", 12.3456),
        ("caps_mean", 0.25),
    ]
    assert "| fid | 12.35 |" in text and "Its training data: me/rings." in text
    assert "(model_card.png)" in text and "top_k 300" in text
    with Image.open(tmp_path / "pipe" / "model_card.png") as sheet:
        first = pipe(prompts, seed=0)[0].resize((128, 128), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(sheet)[6:134, 6:134], np.asarray(first))
    pipe.save(tmp_path / "pipe")  # an older card's images do not stay
    assert not (tmp_path / "pipe" / "model_card.png").exists()


@pytest.mark.parametrize("results", [{"fid": float("nan")}, {"fid": "low"}, [1.0]])
def test_results_in_a_card_must_be_numbers(results):
    with pytest.raises(ValueError, match="result"):
        CardDetails(results=results)

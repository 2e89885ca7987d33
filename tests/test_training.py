"""``clipgen.training``: training from Python, without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import TRANSFORMER_SECTIONS, TRANSFORMER_SIZES, VQGAN_SECTIONS, VQGAN_SIZES, nested

from clipgen import VQGAN, ConditionalTransformer, TextToImage
from clipgen.training import TrainingConfig, build, train
from clipgen.training.instantiate import instantiate

SHAPES = {
    "_target_": "clipgen.data.shapes.shapes_data",
    "train_size": 16,
    "val_size": 4,
    "image_size": 32,
    "batch_size": 4,
}
TRAINER = {"max_steps": 2, "accelerator": "cpu"}


def vqgan_config(output: Path, **settings) -> TrainingConfig:
    model = nested(VQGAN_SECTIONS, VQGAN_SIZES)
    return TrainingConfig("vqgan", str(output), data=SHAPES, model=model, trainer=TRAINER, **settings)


def transformer_config(output: Path, vqgan: Path) -> TrainingConfig:
    sizes = {key: value for key, value in TRANSFORMER_SIZES.items() if key not in ("codebook_size", "num_tokens")}
    model = nested(TRANSFORMER_SECTIONS, sizes)
    return TrainingConfig("transformer", str(output), data=SHAPES, model=model, trainer=TRAINER, vqgan=str(vqgan))


def test_both_stages_train_from_plain_dictionaries(tmp_path):
    train(vqgan_config(tmp_path / "vqgan"))
    train(transformer_config(tmp_path / "transformer", tmp_path / "vqgan"))
    pipe = TextToImage.load(tmp_path / "transformer")
    assert pipe("a large blue ring on a white background", seed=0)[0].size == (32, 32)
    assert (tmp_path / "vqgan" / "grids" / "reconstructions_0000002.png").is_file()


def test_the_written_configuration_trains_the_same_model(tmp_path):
    train(vqgan_config(tmp_path / "first"))
    values = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    train(TrainingConfig.from_dict(values | {"output": str(tmp_path / "second")}))
    first, second = (VQGAN.load(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(second[name].equal(value) for name, value in first.items())


def test_a_run_is_resumed_in_its_folder_and_not_overwritten(tmp_path):
    train(vqgan_config(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="output already contains a run"):
        train(vqgan_config(tmp_path / "run"))
    config = vqgan_config(tmp_path / "run", resume=str(tmp_path / "run"))
    config.trainer["max_steps"] = 3
    train(config)


def test_a_run_from_another_model_resumes_without_it(tmp_path):
    """Its network is not that of the configuration, and its weights are in the checkpoint."""
    source = build(vqgan_config(tmp_path))
    source.save(tmp_path / "source")
    config = vqgan_config(tmp_path / "run", init_from=str(tmp_path / "source"))
    config.model = {key: value for key, value in config.model.items() if key not in ("autoencoder", "quantizer")}
    train(config)
    (tmp_path / "source").rename(tmp_path / "moved")
    config.resume = config.output
    config.trainer["max_steps"] = 3
    train(config)
    assert VQGAN.load(tmp_path / "run").hparams["autoencoder"] == source.hparams["autoencoder"]


def test_metrics_of_an_earlier_attempt_are_not_those_of_a_new_run(tmp_path):
    """It ended before its first checkpoint, so that its folder may be used again."""
    logger = {"_target_": "clipgen.training.csv_logger.CSVLogger", "save_dir": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train/loss\n0,99.5\n")
    config = vqgan_config(tmp_path / "run", logger=logger)
    config.trainer["log_every_n_steps"] = 2
    train(config)
    text = (tmp_path / "run" / "metrics.csv").read_text()
    assert "99.5" not in text and "val/loss" in text


def test_build_returns_the_model_of_each_stage(tmp_path):
    vqgan = build(vqgan_config(tmp_path))
    assert isinstance(vqgan, VQGAN)
    vqgan.save(tmp_path / "vqgan")
    transformer = build(transformer_config(tmp_path, tmp_path / "vqgan"))
    assert isinstance(transformer, ConditionalTransformer) and transformer.num_tokens == 16


def test_wrong_types_name_the_key(tmp_path):
    config = vqgan_config(tmp_path / "run")
    config.trainer["max_steps"] = "many"
    with pytest.raises(TypeError, match=r"trainer\.max_steps must be int, got 'many'"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_unknown_stages_are_refused():
    with pytest.raises(ValueError, match="stage_name must be one of vqgan, transformer, got 'x'"):
        TrainingConfig("x", "run", data=SHAPES)


def test_misspelled_keys_are_refused():
    values = {"stage_name": "vqgan", "output": "run", "data": SHAPES, "trainr": TRAINER, "resum": None}
    with pytest.raises(ValueError, match=r"keys of a configuration must be of stage_name, .*, got trainr, resum"):
        TrainingConfig.from_dict(values)


def test_effective_batch_size_is_that_of_all_devices():
    """The steps of a recipe keep their meaning on any number of devices."""
    model = {"optimizer": {"grad_accum_steps": 2}}
    for devices, batch_size in ((1, 32), (8, 4), (32, 1)):
        config = TrainingConfig("vqgan", "run", data=SHAPES, model=model, effective_batch_size=64)
        config.divide_batch(devices)
        assert config.data == {**SHAPES, "batch_size": batch_size}
    with pytest.raises(ValueError, match="must be a multiple of 6, 3 devices times 2 accumulated batches, got 64"):
        config.divide_batch(3)


def test_nested_sections_are_made_too(tmp_path):
    logger = {"_target_": "clipgen.training.csv_logger.CSVLogger", "save_dir": str(tmp_path)}
    trainer = instantiate({"_target_": "pytorch_lightning.Trainer", "logger": [logger], "accelerator": "cpu"})
    assert Path(trainer.loggers[0].log_dir) == tmp_path


def test_training_imports_nothing_of_the_command_line():
    code = (
        "import sys\nfrom clipgen.training import TrainingConfig, build, train\n"
        "print([name for name in ('hydra', 'omegaconf', 'clipgen.cli') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""``clipgen-train stage=vqgan`` and ``clipgen-train stage=transformer vqgan=PATH``."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import EXPECTED, guarded

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

logger = logging.getLogger("clipgen.train")
PACKAGES = (
    "clipgen",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "hydra-core",
)


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-train", run_hydra)


def run_hydra() -> int:
    """Hand over to Hydra for the configuration; errors come back here, to be told in one sentence."""
    import hydra
    from hydra.errors import HydraException

    from clipgen.cli.config import config_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints them itself, over many lines
    outcome: list[int | BaseException] = []

    @hydra.main(config_path=config_dir(), config_name="train", version_base="1.3")
    def task(config: DictConfig) -> None:
        try:
            outcome.append(train(config))
        except EXPECTED as error:
            outcome.append(root_cause(error))

    try:
        task()
    except HydraException as error:
        raise ValueError(explain(error)) from error
    for error in outcome:
        if isinstance(error, BaseException):
            raise error
    return max((code for code in outcome if isinstance(code, int)), default=0)


def root_cause(error: BaseException) -> BaseException:
    """What a constructor raised, without Hydra's wrapping."""
    from hydra.errors import InstantiationException

    return root_cause(error.__cause__) if isinstance(error, InstantiationException) and error.__cause__ else error


def explain(error: Exception) -> str:
    """Hydra's message in one sentence; a key that does not exist is named with what to do."""
    text = " ".join(str(error).split()).split(" Config search path")[0]
    if text.startswith("Could not override"):
        cause = " ".join(str(error.__cause__).split()).split(" full_key")[0]
        return f"{text.split(' To append')[0].rstrip('.')}: {cause}; clipgen-train --help lists the keys"
    return text


def train(config: DictConfig) -> int:
    """Train one stage as configured: 0, or 130 where Ctrl-C stopped it. The run folder is ``config.output``."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf

    from clipgen import callbacks
    from clipgen.cli.config import as_yaml, make

    if missing := OmegaConf.missing_keys(config):
        raise ValueError(
            f"stage={config.stage_name} needs a value for {', '.join(sorted(missing))}: give {min(missing)}=..."
        )
    OmegaConf.resolve(config)
    output = Path(config.output)
    ckpt = find_resume(config.resume)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = make(config.data)
    model = build(config)
    stop = callbacks.StopCleanly(output / "checkpoints" / "last.ckpt")
    trainer = make(
        config.trainer,
        default_root_dir=str(output),
        logger=make(config.logger) if "_target_" in config.logger else False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=sys.stderr.isatty(),
        callbacks=[stop, callbacks.Pictures(output / "pictures", **OmegaConf.to_object(config.pictures)),
                   *callbacks.checkpoints(output / "checkpoints", config.monitor, config.checkpoint.every_n_steps),
                   callbacks.Results(), *([callbacks.Bar()] if sys.stderr.isatty() else [])],
    )  # fmt: skip
    if trainer.is_global_zero:
        prepare(output, as_yaml(config), model)
    return fit(trainer, model, data, ckpt, stop, output)


def build(config: DictConfig) -> pl.LightningModule:
    """The model to train; in stage 2 with its frozen pair, whose sizes fill what the configuration leaves open."""
    from clipgen import VQGAN
    from clipgen.cli.config import make

    if config.stage_name == "vqgan":
        return make(config.model)
    vqgan = VQGAN.load(config.vqgan)
    clip = make(config.clip)
    sizes = {
        "codebook_size": vqgan.codebook_size,
        "num_tokens": (config.data.image_size // vqgan.downsampling) ** 2,
        "clip_dim": clip.embed_dim,
    }
    return make(config.model, **{k: v for k, v in sizes.items() if config.model[k] is None}).attach(vqgan, clip)


def prepare(output: Path, yaml: str, model: pl.LightningModule) -> None:
    """Begin the run folder: configuration, versions, and in stage 2 the frozen models, so that it can be moved."""
    from clipgen import ConditionalTransformer
    from clipgen.pipeline import save_frozen

    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    (output / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    if isinstance(model, ConditionalTransformer):
        save_frozen(output, *model.frozen())


def fit(trainer: pl.Trainer, model: Any, data: Any, ckpt: str | None, stop: Any, output: Path) -> int:
    """Train, then leave the finished model in the run folder."""
    try:
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        if not stop.asked:
            raise
        logger.info("Stopped at step %d; go on with resume=%s", trainer.global_step, output)
        return 130
    if trainer.is_global_zero:
        trainer.save_checkpoint(stop.checkpoint, weights_only=False)
        best = output / "checkpoints" / "best.ckpt"
        name = "transformer" if hasattr(model, "sample") else "vqgan"
        finished = type(model).load(best) if best.is_file() else model
        finished.save(output / name)
        logger.info("Finished %d steps: %s", trainer.global_step, output)
    return 0


def find_resume(resume: str | None) -> str | None:
    """The checkpoint to go on from: a file, or last.ckpt of a run folder."""
    if resume is None:
        return None
    path = Path(resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"resume must name a .ckpt or a run folder with checkpoints/last.ckpt, got {resume}")
    return str(path)


if __name__ == "__main__":
    main()

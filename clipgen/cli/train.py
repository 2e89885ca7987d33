"""``clipgen-train stage=vqgan`` and ``clipgen-train stage=transformer vqgan=PATH``."""

from __future__ import annotations

import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import guarded
from clipgen.cli.output import output_folder

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


def run_hydra() -> None:
    """Hand over to Hydra for the configuration; errors come back here, to be told in one sentence."""
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
        return
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    from clipgen.cli.config import config_dir, explain
    from clipgen.cli.resuming import refuse_other_runs, with_the_runs

    sys.argv[1:] = with_the_runs(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints them itself, over many lines
    errors: list[Exception] = []

    @hydra.main(config_path=config_dir(), config_name="train", version_base="1.3")
    def task(config: DictConfig) -> None:
        from lightning_fabric.utilities.exceptions import MisconfigurationException

        if sweep := HydraConfig.get().mode == RunMode.MULTIRUN:
            config.output = HydraConfig.get().runtime.output_dir
        try:
            refuse_other_runs(config)
            train(config, sweep)
        except MisconfigurationException as error:
            errors.append(ValueError(str(error)))
        except Exception as error:  # the other runs of a sweep go on
            errors.append(error)

    try:
        task()
    except HydraException as error:
        raise ValueError(explain(error)) from error
    if errors:
        raise errors[0]


def help_text() -> str:
    """What --help prints; quicker than Hydra's own, which needs a stage before it answers."""
    from clipgen.cli.config import config_dir

    groups = {
        folder.name: "|".join(sorted(file.stem for file in folder.glob("*.yaml")))
        for folder in sorted(Path(config_dir()).iterdir())
        if folder.is_dir() and folder.name not in ("stage", "recipe", "trainer")
    }
    return f"""usage: clipgen-train stage=vqgan [key=value ...]
       clipgen-train stage=transformer vqgan=RUN [key=value ...]

Train the tokenizer, then the transformer on top of it. Ctrl-C saves and stops.

choices:
{chr(10).join(f"  {group}={options}" for group, options in groups.items())}

often needed:
  output=FOLDER             the run folder (default: outputs/STAGE/TIME)
  resume=RUN                go on with a run, in its folder; other arguments change its own
  trainer.max_steps=1000    any key that  clipgen-train stage=vqgan --cfg job  shows

several runs, one after another:
  clipgen-train --multirun stage=vqgan key=a,b"""


def train(config: DictConfig, sweep: bool = False) -> None:
    """Train one stage as configured; KeyboardInterrupt where Ctrl-C stopped it. The run folder is ``config.output``."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf

    from clipgen.cli.config import make
    from clipgen.cli.resuming import find_checkpoint

    if is_encoded(config):
        settle_encoded(config)
    if missing := OmegaConf.missing_keys(config):
        names = ", ".join(sorted(missing))
        raise ValueError(f"stage={config.stage_name} needs a value for {names}: give {min(missing)}=...")
    OmegaConf.resolve(config)
    for key in ("output", "resume", "vqgan"):  # YAML's numbers, null and lists
        value = config.get(key)
        if not isinstance(value, str) and (key == "output" or value is not None):
            raise TypeError(f"{key} must be a path, got {value!r}: put quotes around it, {key}=\\'...\\'")
    output = Path(config.output)
    trainer = make_trainer(config, output)
    if sweep and trainer.world_size > 1:
        raise ValueError(f"--multirun needs a single device, got {trainer.world_size}: each starts its own sweep")
    data = make(config.data)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = build(config)
    ckpt = find_checkpoint(config.resume, model, config.trainer.max_steps or -1)
    if not trainer.is_global_zero:
        return fit(trainer, model, data, ckpt, output)
    with output_folder(output, keep="checkpoints/*.ckpt"):
        prepare(output, config, model)
        fit(trainer, model, data, ckpt, output)


def make_trainer(config: DictConfig, output: Path) -> pl.Trainer:
    """Lightning's trainer with our callbacks."""
    from clipgen import callbacks, resume
    from clipgen.cli.config import make
    from clipgen.cli.progress import ProgressReport

    folder = output / "checkpoints"
    strategy = config.trainer.strategy
    # before discriminator_start the discriminator gets no gradients, which plain DDP refuses
    if strategy == "auto" and config.trainer.devices != 1:
        strategy = "ddp_find_unused_parameters_true"
    if fsdp := strategy == "fsdp":
        strategy = sharded(config)
    return make(
        config.trainer,
        strategy=strategy,
        default_root_dir=str(output),
        logger=make(config.logger) if "_target_" in config.logger else False,
        enable_progress_bar=False,  # ours counts steps
        enable_model_summary=False,
        plugins=[resume.WholeCheckpoints()],
        callbacks=[resume.StepSeeds(config.seed),
                   *([] if fsdp else [make(config.pictures, folder=output / "pictures")]),  # one process draws them
                   *([make(config.metrics)] if "metrics" in config else []),
                   *make(config.checkpoint, folder=folder, monitor=config.monitor), callbacks.Results(),
                   ProgressReport(bar=sys.stderr.isatty())],
    )  # fmt: skip


def sharded(config: DictConfig) -> Any:
    """FSDP over all devices, with whole checkpoints. Lightning's ``fsdp`` is torch's first, which flattens the
    weights: weight decay and Muon must tell matrices from vectors."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    devices = config.trainer.devices
    if config.stage_name != "transformer":
        raise ValueError("trainer.strategy must not be fsdp in stage=vqgan: its weights fit anywhere; take ddp")
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices with trainer.strategy=fsdp, got {devices}")
    processes = devices * config.trainer.num_nodes
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def build(config: DictConfig) -> pl.LightningModule:
    """The model to train, with the weights that it starts from."""
    from clipgen.cli.config import make

    if config.stage_name == "vqgan":
        return make(config.model) if config.start_from is None else start_from(config)
    model = build_encoded(config) if is_encoded(config) else build_online(config)
    if config.language_weights is not None and config.resume is None:
        model.start_from_language(config.language_weights)
    return model


def build_online(config: DictConfig) -> Any:
    """The transformer with its frozen pair, whose sizes fill what the configuration leaves open."""
    from clipgen import VQGAN
    from clipgen.cli.config import make

    vqgan = VQGAN.load(config.vqgan)
    warn_of_size(vqgan, config.data.image_size)
    clip = make(config.clip)
    sizes = {
        "codebook_size": vqgan.codebook_size,
        "num_tokens": (config.data.image_size // vqgan.downsampling) ** 2,
        "clip_dim": clip.embed_dim,
    }
    return make(config.model, **{k: v for k, v in sizes.items() if config.model[k] is None}).attach(vqgan, clip)


def warn_of_size(vqgan: Any, image_size: int) -> None:
    """Any size divisible by f works; another than in stage 1 is more often forgotten than wanted."""
    trained = vqgan.hparams.resolution
    if image_size != trained:
        sizes = [f"{size} ({(size // vqgan.downsampling) ** 2} indices an image)" for size in (trained, image_size)]
        logger.warning("The tokenizer was trained at data.image_size=%s, and is used at %s.", *sizes)


def is_encoded(config: DictConfig) -> bool:
    """Whether training reads a cache."""
    return config.data._target_.endswith("EncodedData")


def settle_encoded(config: DictConfig) -> None:
    """A cache holds its tokenizer, and knows its source: the experiment's own do not apply."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config, "vqgan"):
        config.vqgan = config.data.root
    keys = ("_target_", "root", "batch_size", "num_workers", "seed", "condition")
    config.data = OmegaConf.masked_copy(config.data, keys)  # type: ignore[arg-type]
    if config.data.condition == "label" and "condition_cosine" in config.model:
        config.model.condition_cosine = 1.0  # noise bridges images and sentences, which a class has nothing to do with


def build_encoded(config: DictConfig) -> Any:
    """The transformer for a cache, whose tokenizer and CLIP must be the run's; only the CLIP loss needs them loaded."""
    from clipgen import VQGAN
    from clipgen.cli.config import make
    from clipgen.data.encoded import class_names, read_manifest
    from clipgen.encoding import clip_identity, saved_identity
    from clipgen.files import read_json
    from clipgen.frozen import load_clip

    root = Path(config.data.root).expanduser()
    manifest = read_manifest(root)
    if saved_identity(config.vqgan) != manifest["vqgan"]:
        raise ValueError(f"the encoded cache {root} was made with another tokenizer than {config.vqgan}")
    if clip_identity(config.clip.model_name, config.clip.pretrained) != manifest["clip"]:
        used = f"{config.clip.model_name} {config.clip.pretrained or ''}".strip()
        made = " ".join(filter(None, read_json(root / "clip.json").values()))
        raise ValueError(
            f"the encoded cache {root} was made with the CLIP {made}, not with {used}: name it by clip.model_name and "
            "clip.pretrained"
        )
    sizes = {name: manifest[name] for name in ("codebook_size", "num_tokens", "clip_dim")}
    if config.data.condition == "label":
        return build_labels(config, sizes, class_names(manifest, root))
    model = make(config.model, **{k: v for k, v in sizes.items() if config.model[k] is None})
    if config.model.clip_loss_weight > 0:
        model.attach(VQGAN.load(root), load_clip(root))
    return model


def build_labels(config: DictConfig, sizes: dict[str, Any], names: list[str]) -> pl.LightningModule:
    """The transformer that is given an image's class instead of its CLIP embedding."""
    from clipgen.cli.config import check_types, make

    sizes = sizes | {"clip_dim": len(names)}
    given = {k: v for k, v in sizes.items() if config.model[k] is None} | {"class_names": names}
    check_types(config.model, given)  # as of the transformer, whose arguments it takes
    config.model._target_ = "clipgen.baselines.label.LabelTransformer"
    return make(config.model, **given)


def start_from(config: DictConfig) -> pl.LightningModule:
    """A VQGAN with another's network and weights, to be trained as configured."""
    from clipgen import VQGAN
    from clipgen.cli.config import make
    from clipgen.vqgan import NETWORK

    source = VQGAN.load(config.start_from)
    return make(config.model, **{k: source.hparams[k] for k in NETWORK}, kmeans_iters=0).copy_weights_from(source)


def prepare(output: Path, config: DictConfig, model: pl.LightningModule) -> None:
    """Begin the run folder: configuration, versions, and in stage 2 the frozen models, so that it can be moved."""
    from clipgen import ConditionalTransformer
    from clipgen.cli.config import as_yaml
    from clipgen.cli.resuming import write_arguments
    from clipgen.files import write_json
    from clipgen.frozen import copy_frozen, save_frozen

    (output / "config.yaml").write_text(as_yaml(config))
    write_arguments(output)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    write_json(output / "versions.json", versions)
    if isinstance(model, ConditionalTransformer):
        if is_encoded(config):
            copy_frozen(Path(config.data.root).expanduser(), output)
        else:
            save_frozen(output, *model.frozen())


def fit(trainer: pl.Trainer, model: Any, data: Any, ckpt: str | None, output: Path) -> None:
    """Train, then leave the finished model in the run folder."""
    from clipgen.cli.resuming import ARGUMENTS
    from clipgen.resume import LastCheckpoint
    from clipgen.weights.checkpoint import FOLDERS

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    last = next(callback for callback in callbacks if isinstance(callback, LastCheckpoint))
    try:
        with last.listening():
            trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except SystemExit as exit:  # what Lightning makes of Ctrl-C
        known = (output / ARGUMENTS).is_file()
        goes_on = f"{'clipgen-train' if known else 'the same command with'} resume={output} goes on"
        goes_on = f"; {goes_on}" if last.path.is_file() else ""
        logger.info("Stopped at step %d%s", trainer.global_step, goes_on)
        raise KeyboardInterrupt from exit
    trainer.save_checkpoint(last.path, weights_only=False)  # all processes have a part in it
    if trainer.is_global_zero:
        best = next(callback.best_model_path for callback in callbacks if getattr(callback, "monitor", None))
        final = last.path if model.last_is_best or not Path(best).is_file() else best  # no validation, no best
        type(model).load(final).save(output / FOLDERS[type(model).__name__])
        logger.info("Finished %d steps: %s", trainer.global_step, output)


if __name__ == "__main__":
    main()

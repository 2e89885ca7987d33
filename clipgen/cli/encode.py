"""The command ``clipgen-encode``: run VQ-GAN and CLIP once over a data source, for ``data=cached``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import print_line, run_command

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from clipgen import VQGAN, FrozenCLIP

HELP_TEXT = """usage: clipgen-encode vqgan=RUN output=FOLDER [experiment=NAME] [data=NAME] [key=value ...]

Write a token cache: the VQ-GAN indices and CLIP embeddings of all images. Train from it with
  clipgen-train stage=transformer data=cached data.root=FOLDER

An interrupted run can be restarted and produces identical bytes. Processes of torchrun or of a SLURM
array share the work.

what to encode:
  vqgan=RUN                 the tokenizer: a run folder, checkpoint or model folder of stage 1
  experiment=NAME           preset of data and CLIP, as in the training of the tokenizer
  data.root=FOLDER          your images, with data=folder or experiment=modern
  data.labels=true          store the class of each image, for data.conditioning=class in training
  augmentations=10          crops and flips of each training image (default: 1, the center crop)

where and how:
  output=FOLDER             folder of the cache
  device=cuda               device to use (default: CUDA if available, else MPS, else CPU)
  any other key             see  clipgen-encode --cfg job"""
# Settings of a data source that do not change the content of the cache.
IRRELEVANT_SETTINGS = ("batch_size", "num_workers", "shuffle")


def main() -> None:
    """Run the command."""
    run_command("clipgen-encode", run)


def run() -> None:
    """Compose the configuration of the command line, and encode."""
    if {"-h", "--help"} & set(sys.argv):
        print(HELP_TEXT)
        return
    from clipgen.cli.config import as_yaml, compose_config

    overrides = [argument for argument in sys.argv[1:] if argument not in ("--cfg", "job")]
    config = compose_config(*overrides, name="encode")
    if "--cfg" in sys.argv:
        print(as_yaml(config))
        return
    encode_from_config(config)


def encode_from_config(config: DictConfig) -> None:
    """Write the token cache that a configuration describes."""
    check_encode_config(config)
    # torch is imported only now, after the checks that do not need it.
    from clipgen.hardware.ranks import rank_and_world_size
    from clipgen.storage.output_folder import output_folder
    from clipgen.storage.run_lock import LOCK

    data, vqgan, clip = open_data_and_models(config)
    rank, world_size = rank_and_world_size()
    # Processes with different ranks share a cache; two with the same rank would do the same work.
    with output_folder(Path(config.output), keep_pattern="*", lock=f"{LOCK}-{rank}"):
        finished = write_cache(config, data, vqgan, clip, rank, world_size)
    status = "Finished" if finished else "This process has finished its part, other processes have not"
    print_line(f"{status}: {Path(config.output)}")


def open_data_and_models(config: DictConfig) -> tuple[pl.LightningDataModule, VQGAN, FrozenCLIP]:
    """Load the models to their device, and open the data that they encode."""
    from clipgen import VQGAN
    from clipgen.cli.config import instantiate_node
    from clipgen.hardware.device import default_device
    from clipgen.training.model_builder import warn_of_image_size

    vqgan = VQGAN.load(config.vqgan)
    clip = instantiate_node(config.clip)
    warn_of_image_size(vqgan, config.data.image_size)
    # The batch size of the data module is for training.
    data = instantiate_node(config.data, batch_size=1)
    device = config.device or default_device()
    return data, vqgan.to(device), clip.to(device)


def write_cache(
    config: DictConfig,
    data: pl.LightningDataModule,
    vqgan: VQGAN,
    clip: FrozenCLIP,
    rank: int,
    world_size: int,
) -> bool:
    """Encode this process's share of the images; return whether the cache is complete."""
    from clipgen.cli.progress_bar import progress_bar
    from clipgen.precompute import write_token_cache

    with progress_bar("encoding", images_per_process(data, world_size)) as advance:
        return write_token_cache(
            config.output,
            data,
            vqgan,
            clip,
            {"source": source_settings(config)},
            augmentations=config.augmentations,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            rank=rank,
            world_size=world_size,
            advance=advance,
        )


def check_encode_config(config: DictConfig) -> None:
    """Resolve a configuration and check it as far as possible without torch."""
    from omegaconf import OmegaConf

    from clipgen.cli.config import expand_home
    from clipgen.cli.early_checks import check_path, check_sources, require_values
    from clipgen.cli.model_path import check_model_path

    require_values(config, "clipgen-encode")
    OmegaConf.resolve(config)
    expand_home(config)
    for key in ("augmentations", "shard_size", "batch_size"):
        value = config[key]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    for key in ("output", "vqgan"):
        check_path(key, config[key])
    check_model_path(config.vqgan, "VQGAN")
    check_sources(config.data)


def source_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings of the data source that determine the content of the cache."""
    from clipgen.cli.config import node_to_dict

    return {key: value for key, value in node_to_dict(config.data).items() if key not in IRRELEVANT_SETTINGS}


def images_per_process(data: Any, world_size: int) -> float | None:
    """Return the number of images that each process encodes, or None if it is not known."""
    from torch.utils.data import IterableDataset

    if isinstance(data.train, IterableDataset):
        return None
    return (len(data.train) + len(data.val or ())) / world_size


if __name__ == "__main__":
    main()

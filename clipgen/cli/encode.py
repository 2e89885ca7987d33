"""``clipgen-encode vqgan=RUN output=FOLDER``: CLIP and VQ-GAN once over a data source, for ``data=cached``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clipgen.cli.console import guarded, progress_bar

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """usage: clipgen-encode vqgan=RUN output=FOLDER [experiment=NAME] [data=NAME] [key=value ...]

Run the tokenizer and CLIP once over the images; then train on what they say:
  clipgen-train stage=transformer data=cached data.root=FOLDER

Killed and started again it goes on, to the same bytes. Under torchrun or in a SLURM array, processes share the work.

often needed:
  augmentations=10          crops and flips of each training image (default: 1, the centre crop)
  data.labels=true          each image's class too, for data.conditioning=class in training
  device=cuda               default: the fastest there is
  data.root=/photos         any key that  clipgen-encode --cfg job  shows"""


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-encode", run)


def run() -> None:
    """Compose the configuration of the arguments, encode."""
    if {"-h", "--help"} & set(sys.argv):
        print(HELP)
        return
    from clipgen.cli.config import as_yaml, composed

    arguments = sys.argv[1:]
    if show := "--cfg" in arguments:
        arguments = [a for a in arguments if a not in ("--cfg", "job")]
    config = composed(*arguments, name="encode")
    if show:
        print(as_yaml(config))
        return
    encode(config)


def encode(config: DictConfig) -> None:
    """Encode as configured."""
    from omegaconf import OmegaConf

    from clipgen.cli.early_checks import check_sources, check_tokenizer

    if missing := OmegaConf.missing_keys(config):
        raise ValueError(f"clipgen-encode needs a value for {', '.join(sorted(missing))}: give {min(missing)}=...")
    OmegaConf.resolve(config)
    for key in ("augmentations", "shard_size", "batch_size"):
        if not isinstance(value := config[key], int) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    check_tokenizer(str(config.vqgan))
    check_sources(config.data)
    from clipgen import VQGAN, precompute
    from clipgen.cli.config import make
    from clipgen.cli.device import default_device, rank_and_world_size
    from clipgen.cli.output_dir import output_folder
    from clipgen.cli.run_lock import LOCK
    from clipgen.data.webdataset import ImageShards
    from clipgen.training.build import warn_of_size

    vqgan, clip = VQGAN.load(config.vqgan), make(config.clip)
    warn_of_size(vqgan, config.data.image_size)
    data = make(config.data, batch_size=1)  # its own batches are for training
    for model in (vqgan, clip):
        model.to(config.device or default_device())
    source = OmegaConf.to_container(config.data)
    assert isinstance(source, dict)
    leave_out = ("batch_size", "num_workers", "shuffle")  # they change no byte of the cache
    settings = {"source": {k: v for k, v in source.items() if k not in leave_out}}
    rank, world_size = rank_and_world_size()
    share = None if isinstance(data.train, ImageShards) else (len(data.train) + len(data.val or ())) / world_size
    # processes of several ranks share a cache, two of one rank would do the same work
    lock = output_folder(Path(config.output), keep_pattern="*", lock=f"{LOCK}-{rank}")
    with lock, progress_bar("encoding", share) as advance:
        whole = precompute.encode(
            config.output,
            data,
            vqgan,
            clip,
            settings,
            augmentations=config.augmentations,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            rank=rank,
            world_size=world_size,
            advance=advance,
        )
    print(f"{'Finished' if whole else 'This part is finished, others are not'}: {Path(config.output)}")


if __name__ == "__main__":
    main()

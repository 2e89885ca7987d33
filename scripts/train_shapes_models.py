"""Train the pair of models that is bundled for shapes: the demo's recipe, for longer.

    python scripts/train_shapes_models.py --output runs/bundle

The run folders land in --output; the finished pair, in 16 bits, in the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipgen import TextToImage
from clipgen.cli.config import composed
from clipgen.cli.console import set_up_logging
from clipgen.cli.demo import sample_and_judge
from clipgen.cli.train import train
from clipgen.pipeline import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bundle"))
    parser.add_argument("--vqgan-steps", type=int, default=6000)
    parser.add_argument("--transformer-steps", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_up_logging()
    vqgan, transformer = args.output / "vqgan", args.output / "transformer"
    common = ["experiment=shapes", "logger=csv", f"seed={args.seed}", "trainer.val_check_interval=1000"]
    train(composed("stage=vqgan", f"output={vqgan}", *common, f"trainer.max_steps={args.vqgan_steps}"))
    train(composed("stage=transformer", f"vqgan={vqgan}", f"output={transformer}", *common,
                   f"trainer.max_steps={args.transformer_steps}"))  # fmt: skip
    pipe = TextToImage.load(transformer)
    pipe.save(BUNDLED["shapes"], half=True)
    print(sample_and_judge(TextToImage.load("shapes"), args.output / "grid.png", args.seed))


if __name__ == "__main__":
    main()

"""Arguments of short runs on photographs, and the image grids that they write."""

from __future__ import annotations

from pathlib import Path

from commands import VQGAN

OPEN = [*VQGAN, "trainer.val_check_interval=null"]
SMALL = ["data.image_size=32", "data.batch_size=4", "data.num_workers=0", "output=run"]
FOLDER = ["data=folder", "data.root=photos"]
SHARDS = ["data=webdataset", "data.train_urls='shards/train-*.tar'", "data.val_urls='shards/val-*.tar'"]


def grids(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "grids").glob("reconstructions_*"))

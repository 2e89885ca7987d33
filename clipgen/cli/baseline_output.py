"""The images that ``clipgen-baseline`` writes."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import print_line
from clipgen.generation.file_names import file_name

if TYPE_CHECKING:
    from torch import Tensor


class ImageOutput:
    """The images of a command: one PNG each with its settings as metadata, and all of them in ``grid.png``."""

    def __init__(self, args: Namespace, settings: dict[str, Any]):
        import clipgen

        self.folder = args.output
        self.columns = args.num_images if args.system != "search" else None
        self.metadata = {"baseline": args.system, **settings, "clipgen": clipgen.__version__}
        self.num_groups = 0
        self.images: list[Any] = []
        self.captions: list[str] = []

    def add(self, images: Tensor, caption: str, seeds: list[int], metadata: list[dict[str, Any]]) -> None:
        """Write the images (B, 3, H, W) of one prompt or class.

        Args:
            images: the images.
            caption: the prompt or class.
            seeds: seed of each image.
            metadata: metadata of each image.
        """
        from clipgen.images import save_png, to_pil

        for image, seed, own_metadata in zip(to_pil(images), seeds, metadata):
            path = self.folder / file_name(f"{self.num_groups:02d}", caption, str(seed))
            print_line(save_png(image, path, {"seed": seed, **own_metadata, **self.metadata}))
            score = own_metadata.get("clip_score")
            self.images.append(image)
            self.captions.append(caption if score is None else f"{caption} ({score:.3f})")
        self.num_groups += 1

    def save_grid(self) -> None:
        """Write the grid of all images."""
        from clipgen.images import save_png
        from clipgen.visualization import grid

        columns = self.columns if self.num_groups > 1 else None
        print_line(save_png(grid(self.images, columns, self.captions), self.folder / "grid.png"))

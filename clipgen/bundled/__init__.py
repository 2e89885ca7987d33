"""The models in the package, in 16 bits: folders that ``TextToImage.load`` reads, by name."""

from pathlib import Path

BUNDLED = {name: Path(__file__).parent / name for name in ("shapes",)}

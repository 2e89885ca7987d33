"""The models in the package, in 16 bits: folders that ``TextToImage.load`` reads, by name."""

from pathlib import Path

# What each model was trained on.
CONTENT = {
    "shapes": "colored shapes of 32 x 32 pixels",
    "cifar10": "photographs of the ten classes of CIFAR-10, 32 x 32 pixels",
}
DEFAULT = "shapes"
BUNDLED_NAMES = " or ".join(CONTENT)
BUNDLED = {name: Path(__file__).parent / name for name in CONTENT}

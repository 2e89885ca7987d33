"""clipgen: train a text-to-image model from images alone, after CLIP-GEN (arXiv:2203.00386)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names, each imported at its first use: ``import clipgen`` loads no torch.
_HOME = {
    "FrozenCLIP": "clipgen.clip",
    "VQGAN": "clipgen.vqgan",
    "ConditionalTransformer": "clipgen.transformer",
    "TextToImage": "clipgen.pipeline",
}
__all__ = ["VQGAN", "ConditionalTransformer", "FrozenCLIP", "TextToImage", "__version__"]

if TYPE_CHECKING:
    from clipgen.clip import FrozenCLIP
    from clipgen.pipeline import TextToImage
    from clipgen.transformer import ConditionalTransformer
    from clipgen.vqgan import VQGAN


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipgen' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

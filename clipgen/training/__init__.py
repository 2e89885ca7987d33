"""Training of both stages from plain Python values, without the command line.

from clipgen.training import TrainingConfig, train

train(TrainingConfig(
    stage_name="vqgan",
    output="runs/vqgan",
    data={"_target_": "clipgen.data.shapes.shapes_data", "train_size": 1000, "val_size": 100},
    trainer={"max_steps": 100},
))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported when they are first used: the command line reads its configuration before it loads torch.
_MODULES = {
    "TrainingConfig": "clipgen.training.config",
    "build": "clipgen.training.model_builder",
    "train": "clipgen.training.run",
}
__all__ = ["TrainingConfig", "build", "train"]

if TYPE_CHECKING:
    from clipgen.training.config import TrainingConfig
    from clipgen.training.model_builder import build
    from clipgen.training.run import train


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'clipgen.training' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)

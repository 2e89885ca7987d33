"""The systems that the papers compare with. ``load_generator`` is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgen.baselines.generators import load_generator

__all__ = ["load_generator"]

GENERATOR_FORMS = "a run folder, biggan:FILE, sagan:FILE, a TorchScript file or module:function"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clipgen.baselines import generators

    return getattr(generators, name)

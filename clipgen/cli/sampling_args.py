"""Sampling parameters as command-line options, shared by several commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipgen.generation.sampling_options import SAMPLING_OPTIONS
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from argparse import Namespace, _ActionsContainer


def add_sampling_options(parser: _ActionsContainer, given_only: bool = False) -> None:
    """Add one option per sampling parameter.

    Args:
        parser: parser or argument group.
        given_only: let ``sampling_options`` return only the options that were given.
    """
    for name, option in SAMPLING_OPTIONS.items():
        default = getattr(SamplingParams(), name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=option.type,
            default=None if given_only else default,
            metavar=option.type.__name__.upper(),
            help=f"{option.help} (default: {default})",
        )


def sampling_options(args: Namespace) -> dict[str, Any]:
    """Return the sampling parameters that have a value, by name."""
    values = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def sampling_params(args: Namespace) -> SamplingParams:
    """Return the sampling parameters.

    Raises:
        ValueError: a value is out of range.
    """
    return SamplingParams(**sampling_options(args))

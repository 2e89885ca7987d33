"""Sampling parameters as command-line options, shared by several commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipgen.cli.given_options import option_name
from clipgen.generation.sampling_options import SAMPLING_OPTIONS
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from argparse import Namespace, _ActionsContainer


def add_sampling_options(parser: _ActionsContainer) -> None:
    """Add one option per sampling parameter."""
    for name, option in SAMPLING_OPTIONS.items():
        parser.add_argument(
            option_name(name),
            type=option.type,
            metavar=option.type.__name__.upper(),
            help=f"{option.help} (default: the model's, usually {getattr(SamplingParams, name)})",
        )


def sampling_options(args: Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were given, by name.

    Raises:
        ValueError: a value is out of range.
    """
    values = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    options = {name: value for name, value in values.items() if value is not None}
    SamplingParams(**options)
    return options

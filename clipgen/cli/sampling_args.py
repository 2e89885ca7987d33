"""The settings of drawing, as options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace, _ActionsContainer

SETTINGS: dict[str, tuple[type, Any, str]] = {
    "temperature": (float, 1.0, "0 takes the likeliest code"),
    "top_k": (int, 300, "keep the k likeliest codes; 300 is the paper's"),
    "top_p": (float, 1.0, "keep the likeliest codes up to p"),
    "guidance_scale": (float, 1.0, "1 is none; needs a model trained for it"),
    "guidance_power": (float, 0.0, "above 0 guidance grows along the image, below it fades"),
}  # type, default, help


def add_settings(p: _ActionsContainer, given_only: bool = False) -> None:
    """Add an option for each. ``given_only``: what is not given is left to what draws."""
    for name, (kind, default, text) in SETTINGS.items():
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=None if given_only else default,
            help=f"{text} (default: {default})",
        )


def settings_of(args: Namespace) -> dict[str, Any]:
    """Those that have a value."""
    return {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}

"""Refuse options of ``clipgen-baseline`` that would have no effect in combination with the others."""

from __future__ import annotations

import argparse

from clipgen.bundled import DEFAULT
from clipgen.cli.given_options import is_given, option_name

# Defaults of the options that the parsers leave at None, which shows that they are absent from the command line.
DEFAULTS = {
    "seed": 0,
    "checkpoint": DEFAULT,
    "class_temperature": 2.0,
    "k": 10,
    "seeds": [42, 43, 44],
    "clip_input": "published",
}


def check_effects(args: argparse.Namespace) -> None:
    """Raise ValueError if an option was given that has no effect in combination with the others."""
    if args.system != "class":
        refuse(args, ("split",), not args.captions, "needs --captions with a folder of CUB-200-2011")
    if args.system == "vqgan-clip":
        refuse(args, ("checkpoint",), args.vqgan and args.clip, "has no effect with both --vqgan and --clip")
    elif args.system == "biggan-clip":
        refuse(args, ("class_temperature",), args.max_classes is None, "needs --max-classes")
    elif args.system == "search":
        makes_table = bool(args.table or args.protocol)
        refuse(args, ("clip_input", "one_caption"), not args.protocol, "needs --protocol")
        refuse(args, ("threshold", "seeds", "save_best"), not makes_table, "needs --table or --protocol")
        refuse(
            args, ("k", "seed"), makes_table, "has no effect with --table and --protocol, which try all k and --seeds"
        )


def refuse(args: argparse.Namespace, names: tuple[str, ...], has_no_effect: object, reason: str) -> None:
    """Raise ValueError if one of the options was given although it has no effect."""
    for name in names:
        if has_no_effect and is_given(args, name):
            raise ValueError(f"{option_name(name)} {reason}")

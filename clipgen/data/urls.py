"""Expand the names of shards: paths, URLs and commands, with braces and globs."""

from __future__ import annotations

import glob
import os
import re

from braceexpand import braceexpand


def expand_urls(urls: str | list[str], option: str = "urls") -> list[str]:
    """List the shards that ``urls`` names; see ``ImageShards``.

    Args:
        urls: paths, URLs and commands.
        option: name of the option that contains them, for errors.

    Raises:
        FileNotFoundError: a local shard does not exist, or nothing matches a pattern.
        ValueError: no shard is named, or braces do not match.
    """
    patterns = urls if isinstance(urls, list) else _split_at_commas(urls)
    shards = []
    for pattern in patterns:
        if pattern.strip():
            shards += _expand_pattern(pattern.strip(), option)
    if not shards:
        raise ValueError(f"{option} must name at least one shard, got {urls!r}")
    return shards


def _split_at_commas(urls: str) -> list[str]:
    """Split at the commas outside of braces; a command or an existing file is not split."""
    if urls.startswith("pipe:") or os.path.exists(urls):
        return [urls]
    # In another pair of braces, the commas outside of the inner braces are alternatives.
    return list(braceexpand("{" + urls + ",}", escape=False))


def _expand_pattern(pattern: str, option: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    # The name of an existing file may contain braces.
    if os.path.exists(pattern):
        return [pattern]
    shards = []
    for alternative in braceexpand(pattern, escape=False):
        matches = [alternative] if is_remote(alternative) else sorted(glob.glob(alternative, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{option} must name existing shards, got {alternative}")
        shards += matches
    return shards


def is_remote(url: str) -> bool:
    """Return whether this is a URL or a command, not a file."""
    return bool(re.match("[a-z][a-z0-9+.-]+:", url)) and not os.path.exists(url)

"""Which shards a user means: paths, URLs and commands, with braces and globs."""

from __future__ import annotations

import glob
import os
import re

from braceexpand import braceexpand


def expand_urls(urls: str | list[str]) -> list[str]:
    """List the shards that `urls` stands for; see `ImageShards` of `data.shards`.

    Raises:
        FileNotFoundError: a local shard does not exist, or nothing matches a pattern.
        ValueError: no shard is named, or braces do not match.
    """
    parts = urls if isinstance(urls, list) else [urls]
    if isinstance(urls, str) and not urls.startswith("pipe:") and not os.path.exists(urls):
        parts = list(braceexpand("{" + urls + ",}", escape=False))  # splits at the commas that stand outside braces
    shards = [shard for part in parts if part.strip() for shard in _expand(part.strip())]
    if not shards:
        raise ValueError(f"urls must name at least one shard, got {urls!r}")
    return shards


def _expand(url: str) -> list[str]:
    url = os.path.expanduser(url)
    if os.path.exists(url):  # also where the name has braces in it
        return [url]
    shards = []
    for pattern in braceexpand(url, escape=False):
        matches = [pattern] if is_remote(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise FileNotFoundError(f"urls must name existing shards, got {pattern}")
        shards += matches
    return shards


def is_remote(url: str) -> bool:
    """Whether it is a URL or a command, and no file."""
    return bool(re.match("[a-z][a-z0-9+.-]+:", url)) and not os.path.exists(url)

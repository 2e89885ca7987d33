"""Write the address of the repository, which pyproject.toml states as Repository, to the places that cannot read it.

    python -m clipgen repository_address
    python -m clipgen repository_address --expect OWNER/NAME

With --expect nothing is written: it is an error if a file, or pyproject.toml itself, names another repository.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Files in which every repository on GitHub is this one.
FILES = (
    "pyproject.toml",
    "scripts/notebooks/*.ipynb",
    "scripts/replicate/requirements.txt",
    "scripts/space/requirements.txt",
    "scripts/space/README.md",
    ".github/docs/web_page.md",
    ".github/ISSUE_TEMPLATE/config.yml",
)
STATED = re.compile(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"', re.MULTILINE)
NAMED = re.compile(r"(github\.com/|google\.com/github/)[\w.-]+/[\w.-]*[\w-]")


def repository_name() -> str:
    """Return the name that pyproject.toml states, ``OWNER/NAME``."""
    stated = STATED.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if stated is None:
        raise SystemExit("pyproject.toml must state Repository under [project.urls], got no address on github.com")
    return stated[1]


def outdated_files(name: str) -> dict[Path, str]:
    """Return the files that name another repository, and what they should contain."""
    texts = {}
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            changed = NAMED.sub(rf"\g<1>{name}", text)
            if changed != text:
                texts[path] = changed
    return texts


def main() -> None:
    """Write the address, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expect", metavar="OWNER/NAME", help="check that all files name this repository")
    args = parser.parse_args()
    name = repository_name()
    if args.expect and args.expect != name:
        raise SystemExit(f"Repository under [project.urls] in pyproject.toml must be {args.expect}, got {name}")
    for path, text in outdated_files(name).items():
        if args.expect:
            raise SystemExit(f"{path} names another repository: run python -m clipgen repository_address")
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()

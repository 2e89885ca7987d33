"""Build the documentation site from the pages of ``.github`` and the docstrings, into ``.github/site``.

The pages are written for GitHub, where they link to files all over the repository. They are copied to one folder first,
with links that work on the site. Needs the extra ``docs`` (Python 3.11 or newer).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
SOURCE = GITHUB / "site_source"
SITE = GITHUB / "site"
CONFIG = GITHUB / "zensical.toml"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def site_files() -> dict[Path, Path]:
    """Return the place on the site of each page, image and notebook."""
    files = {ROOT / "README.md": Path("readme.md")}
    for page in (GITHUB / "docs").glob("*.md"):
        files[page] = Path(page.name)
    for page in GITHUB.glob("[A-Z]*.md"):
        files[page] = Path(page.name.lower())
    for image in (GITHUB / "pictures").iterdir():
        files[image] = Path("pictures", image.name)
    return files


def site_text(page: Path, files: dict[Path, Path], repository: str) -> str:
    """Return the text of a page with its links changed to places on the site, or to the repository on GitHub.

    Args:
        page: the page.
        files: see ``site_files``.
        repository: address of the repository; "" leaves only the texts of links to files that the site does not have.
    """

    def change(link: re.Match[str]) -> str:
        start, path, end = link.groups()
        target = (page.parent / path).resolve()
        if target in files:
            return f"{start}{files[target].as_posix()}{end}"
        if not target.exists():
            raise ValueError(f"{page.relative_to(ROOT)} links to {path}, which does not exist")
        address = f"{repository}/tree/main" if repository else f"{ROOT.as_uri()}"
        return f"{start}{address}/{target.relative_to(ROOT).as_posix()}{end}"

    text = LINK.sub(change, page.read_text(encoding="utf-8"))
    return text if repository else re.sub(rf"\[([^\]]+)\]\({re.escape(ROOT.as_uri())}[^)]*\)", r"\1", text)


def assemble(folder: Path, repository: str = "") -> None:
    """Copy the pages and images of the site to a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    files = site_files()
    for source, place in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(site_text(source, files, repository), encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def main() -> None:
    """Assemble the pages and build the site."""
    parser = argparse.ArgumentParser(description="Build the documentation site into .github/site.")
    parser.parse_args()
    # GitHub sets this variable in its workflows.
    name = os.environ.get("GITHUB_REPOSITORY", "")
    assemble(SOURCE, f"https://github.com/{name}" if name else "")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "-f", str(CONFIG)]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()

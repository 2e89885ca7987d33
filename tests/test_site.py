"""The documentation site: every page is on it, links lead somewhere, every public name has an entry."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import build_docs
import pytest
from test_docs import heading_anchors, name_exists

import clipgen
import clipgen.baselines
import clipgen.training

REFERENCE = build_docs.GITHUB / "docs" / "reference.md"
CONFIG = build_docs.CONFIG.read_text(encoding="utf-8")
MODULES = (clipgen, clipgen.training, clipgen.baselines)


def public_names() -> set[str]:
    """Return the dotted names that the packages offer."""
    names = {f"{module.__name__}.{name}" for module in MODULES for name in module.__all__}
    return names - {"clipgen.__version__"}


def reference_names() -> list[str]:
    """Return the names that the reference describes."""
    return re.findall(r"^::: ([\w.]+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)


def test_reference_describes_every_public_name():
    assert public_names() <= set(reference_names())
    assert all(name_exists(name) for name in reference_names())


def test_every_page_is_in_the_navigation(tmp_path):
    build_docs.assemble(tmp_path)
    pages = {path.name for path in tmp_path.glob("*.md")}
    assert pages == set(re.findall(r'"([\w-]+\.md)"', CONFIG))


@pytest.mark.parametrize("repository", ["", "https://github.com/me/clipgen"])
def test_links_between_the_assembled_pages_resolve(tmp_path, repository):
    build_docs.assemble(tmp_path, repository)
    internal = 0
    for page in tmp_path.glob("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?://", link):
                continue
            path, _, anchor = link.partition("#")
            target = tmp_path / path if path else page
            assert target.is_file(), f"{page.name} links to {link}"
            assert not anchor or anchor in heading_anchors(target), f"{page.name} links to {link}: no such heading"
            internal += 1
    assert internal > 50
    texts = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("*.md"))
    assert ("https://github.com/me/clipgen/tree/main/configs" in texts) == bool(repository)
    assert "file://" not in texts


def test_link_to_a_missing_file_is_an_error(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("[text](none.md)")
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"page\.md links to none\.md, which does not exist"):
        build_docs.site_text(page, {}, "")


class Page(HTMLParser):
    """Collect the links and anchors of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.add(values.get("id") or "")
        for name in ("href", "src"):
            if values.get(name):
                self.links.append(str(values[name]))


@pytest.mark.slow
def test_site_is_built_without_dead_links_or_requests_to_other_hosts():
    if importlib.util.find_spec("zensical") is None:
        pytest.skip('needs the documentation tools: pip install -e ".[docs]"')
    shutil.rmtree(build_docs.SITE, ignore_errors=True)
    done = subprocess.run([sys.executable, build_docs.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: Page(path) for path in build_docs.SITE.glob("*.html")}
    assert public_names() <= pages["reference.html"].anchors
    for name, page in pages.items():
        for link in page.links:
            address, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:|//|/", address) or name == "404.html":
                continue
            target = (build_docs.SITE / address).resolve() if address else build_docs.SITE / name
            assert target.exists(), f"{name} links to {link}"
            if anchor and target.suffix == ".html":
                assert anchor in pages[target.name].anchors, f"{name} links to {link}: no such heading"
    loaded = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//')
    assert not [path.name for path in build_docs.SITE.glob("*.html") if loaded.search(path.read_text("utf-8"))]

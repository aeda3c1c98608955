"""What mkdocs does for this site beyond its plugins: pages made of the code, links to results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

import reference_pages

ROOT = Path(__file__).parents[2]
SHIM = "https://unpkg.com/iframe-worker/shim"
OWN_SHIM = "javascripts/iframe-worker.js"
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s>]*")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the files of results that pages link to."""
    for path, text in reference_pages.pages().items():
        files.append(File.generated(config, path, content=text))
    for path in sorted((ROOT / "results").rglob("*.json")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """``results/`` lies beside ``docs/`` in the repository and inside of it on the site. A page
    without headings leaves the place of its table of contents to its tables."""
    if not re.search(r"^##", markdown, re.MULTILINE):
        page.meta.setdefault("hide", ["toc"])
    depth = page.file.src_uri.count("/")
    return markdown.replace(f"]({'../' * (depth + 1)}results/", f"]({'../' * depth}results/")


def on_post_page(output: str, page: Any, config: Any) -> str:
    return self_contained(output, page.url)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    return self_contained(output_content, template_name)


def self_contained(html: str, url: str) -> str:
    """A page that reads nothing from elsewhere: the search's helper lies beside it; whatever else
    it would fetch is an error."""
    html = html.replace(SHIM, get_relative_url(OWN_SHIM, url))
    fetched = FETCHED.search(html)
    if fetched:
        raise PluginError(f"{url}: a page of the site would fetch {fetched[0]}")
    return html

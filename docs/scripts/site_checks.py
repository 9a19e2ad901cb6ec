"""A hook of mkdocs: reads the built pages, and warns of links that lead nowhere and of anything from foreign hosts.

mkdocs checks the links of Markdown; this checks what browsers will see, HTML in pages and anchors of the API too.
Warnings end `mkdocs build --strict`.
"""

import functools
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig


RESOURCES = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "track", "video"}
IN_STYLES = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)")

logger = logging.getLogger("mkdocs.hooks.site_checks")  # below "mkdocs": its warnings are counted


class BuiltPage(HTMLParser):
    """What a page has to offer and asks for: its anchors, its links, and what a browser loads to show it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        urls = [values[name] for name in ("href", "src", "poster", "data") if name in values]
        urls += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.links += urls
        if tag in RESOURCES:
            self.resources += urls


@functools.cache
def built_page(path: Path) -> BuiltPage:
    return BuiltPage(path.read_text("utf-8"))


def on_post_build(config: MkDocsConfig) -> None:
    for fault in faults(Path(config.site_dir)):
        logger.warning(fault)


def faults(site: Path) -> list[str]:
    """What is wrong with a built site, a line each."""
    built_page.cache_clear()
    found = []
    for path in sorted(site.rglob("*.html")):
        if path.name == "404.html":  # is shown at any address, so its links start at the host's root
            continue
        page = built_page(path)
        name = path.relative_to(site)
        found += [f"{name} loads {url} from a foreign host." for url in page.resources if is_foreign(url)]
        broken = sorted({url for url in page.links if not is_foreign(url) and not leads_somewhere(url, path)})
        found += [f"{name} links {url}, which the site does not have." for url in broken]
    for path in sorted(site.rglob("*.css")):
        urls = IN_STYLES.findall(path.read_text("utf-8"))
        found += [f"{path.relative_to(site)} loads {url} from a foreign host." for url in urls]
    return found


def is_foreign(url: str) -> bool:
    return bool(urlsplit(url).netloc)


def leads_somewhere(url: str, page: Path) -> bool:
    parts = urlsplit(url)
    if parts.scheme:  # mailto:, data:
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or anchor == "__top" or target.suffix != ".html" or anchor in built_page(target).anchors

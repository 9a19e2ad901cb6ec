"""A hook of mkdocs: pages link files of the repository as on GitHub, and the site shows each such file as a page.

A link such as `../training/configs/sprites.yaml` leads out of docs/. A page of the site takes its place, with the
file's text or the folder's files. A link to what is not there is a warning, which `mkdocs build --strict` ends with.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")
SHOWN_AT = "repository"
PICTURES = {".gif", ".jpg", ".mp4", ".png", ".svg", ".webp"}  # are taken as they are
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".json": "json", ".toml": "toml"}

logger = logging.getLogger("mkdocs.hooks.site_links")  # below "mkdocs": its warnings are counted


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page, or the picture itself, for each file of the repository that a page links."""
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for name in sorted(linked(texts)):
        path, place = ROOT / name, shown_at(name)
        source = {"abs_src_path": str(path)} if path.suffix in PICTURES else {"content": listing(path, name)}
        files.append(File.generated(config, place, inclusion=InclusionLevel.NOT_IN_NAV, **source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links out of docs/ to the pages that show their files."""
    return LINK.sub(lambda match: rewritten(match, page.file.src_uri), markdown)


def linked(texts: dict[str, str]) -> set[str]:
    """The files and folders outside docs/ that pages link, by their names from the repository's root."""
    names = set()
    for page, text in texts.items():
        for match in LINK.finditer(text):
            name = target(page, match[1])
            if name is None:
                continue
            if is_shown(name) and has_heading(name, match[2]):
                names.add(name)
            else:
                link = match[1] + (match[2] or "")
                logger.warning("docs/%s links %s, which the repository does not have.", page, link)
    return names


def target(page: str, link: str) -> str | None:
    """What a page's link names, from the repository's root; None if it stays in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def is_shown(name: str) -> bool:
    return not name.startswith("..") and (ROOT / name).exists()


def has_heading(name: str, anchor: str | None) -> bool:
    """Whether a Markdown file has the heading that a link names, by GitHub's rule."""
    if anchor is None or not name.endswith(".md"):
        return True
    headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return anchor.removeprefix("#") in slugs


def shown_at(name: str) -> str:
    return f"{SHOWN_AT}/{name}" if Path(name).suffix in PICTURES else f"{SHOWN_AT}/{name}.md"


def rewritten(match: re.Match[str], page: str) -> str:
    name = target(page, match[1])
    if name is None or not is_shown(name):
        return match[0]
    shown = posixpath.relpath(shown_at(name), posixpath.dirname(page) or ".")
    return f"]({shown})"


def listing(path: Path, name: str) -> str:
    """A page that shows a file's text, or the names in a folder. It is left out of the search."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path.name}\n\n`{name}` of the repository.\n\n"
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(("_", ".")))
        return head + "".join(f"- `{entry}`\n" for entry in names)
    language = LANGUAGES.get(path.suffix, "text")
    return f"{head}``````{language}\n{path.read_text('utf-8')}\n``````\n"

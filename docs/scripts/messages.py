"""What the programs can say: the texts in their code, with … for what differs from time to time.

As a hook of mkdocs it fills the page of all error messages, so that a search for any of them finds it. A test holds
the messages that docs/troubleshooting.md quotes against the same texts.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
PACKAGES = {
    "refalign": ROOT / "pipelines/refalign",
    "refalign.space": ROOT / "space",
    "refalign_training": ROOT / "training/refalign_training",
    "refalign_evaluation": ROOT / "evaluation/refalign_evaluation",
}
PAGE = "messages.md"
ANY = "…"
SHORTEST = 12  # characters; shorter texts are names


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills the page of all error messages."""
    return markdown + error_messages() if page.file.src_uri == PAGE else markdown


def error_messages() -> str:
    """A heading for each module, and its messages below."""
    parts = []
    for package, folder in PACKAGES.items():
        for path in sources(folder):
            module = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
            texts = sorted(set(raised(parsed(path))))
            if texts:
                parts.append(f"\n## {module}\n")
                parts += [f"- `` {text} ``" for text in texts]
    return "\n".join(parts)


def sources(folder: Path) -> list[Path]:
    """A package's modules, without the copies of them that a Hub repo carries."""
    return [path for path in sorted(folder.rglob("*.py")) if "sprites/model" not in path.as_posix()]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def raised(tree: ast.AST) -> Iterator[str]:
    """The texts of what is raised."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                text = as_text(argument)
                if text is not None and len(text) >= SHORTEST:
                    yield text


def all_texts() -> Iterator[str]:
    """Every text in the code: messages, warnings, and whatever else is said."""
    for folder in PACKAGES.values():
        for path in sources(folder):
            texts = map(as_text, ast.walk(parsed(path)))
            yield from (text for text in texts if text is not None)


def as_text(node: ast.AST) -> str | None:
    """A string or f-string on one line; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.replace("%s", ANY).replace("%d", ANY).split())
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
        return " ".join("".join(map(str, parts)).split())
    return None

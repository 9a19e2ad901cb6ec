"""The code blocks of README.md and docs/, and the commands in them."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r" *```+ *(\w*)")
MARKER = re.compile(r"<!-- not run:(.*?)-->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    name: str
    """The page and the line of the fence, such as `docs/training.md:27`."""
    language: str
    text: str
    reason: str | None
    """Why it is not run, as the marker above it says: `<!-- not run: needs eight GPUs -->`."""


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def read_blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, from the first to the last. Raises ValueError if a fence or a marker stands alone."""
    blocks: list[Block] = []
    lines: list[str] = []
    language, start, reason = None, 0, None
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if language is not None and fence is None:
            lines.append(line)
        elif language is not None:
            text = textwrap.dedent("\n".join(lines)) + "\n"
            blocks.append(Block(f"{page_name(page)}:{start}", language, text, reason))
            language, reason, lines = None, None, []
        elif fence is not None:
            language, start = fence.group(1), number
        elif marker := MARKER.search(line):
            reason = marker.group(1).strip()
        elif line.strip() and reason is not None:
            raise ValueError(f"{page_name(page)}:{number}: the marker above is not followed by a block.")
    if language is not None or reason is not None:
        raise ValueError(f"{page_name(page)}: a block or a marker has no end.")
    return blocks


def read_commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words for words in commands if words]


def read_inline_code(page: Path) -> list[str]:
    """What stands between single backticks outside of blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]

"""README and the pages of docs/ are true: what they show is run, or says why it cannot be and is checked."""

import itertools
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import tyro

from refalign.command_line import REGISTRY, Command, Program
from refalign.convert import convert
from refalign_training.run import trainer
from refalign_training.run.config import RunCommand, flatten
from refalign_training.run.config_files import read_config
from tests.pages import PAGES, ROOT, Block, page_name, read_blocks, read_inline_code
from tests.reader import PROGRAMS, Reader, understand, write_readers_folder


RUN = ("bash", "python")
SHOWN = ("", "text", "mermaid", "bibtex")  # what is there to read


@pytest.fixture(scope="session")
def readers_folder(tmp_path_factory, wan_folder, native_file) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    repo = convert(native_file, wan_folder, folder / "repo", card="refalign-1.3b")
    return write_readers_folder(folder / "work", wan_folder, native_file, repo)


@pytest.fixture
def reader(readers_folder, tmp_path, monkeypatch) -> Reader:
    """A reader at the start of a page, in a folder of its own."""
    shutil.copytree(readers_folder, tmp_path / "folder", symlinks=True)
    monkeypatch.chdir(tmp_path / "folder")
    # A picture takes longer than a run, and nothing here is about it
    monkeypatch.setattr(trainer, "plot_timesteps", lambda *_: None)
    return Reader()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_a_page_shows_is_true(page, reader, subtests):
    """Its blocks in their order, as later ones use what earlier ones wrote."""
    for block in read_blocks(page):
        with subtests.test(block.name):
            try_block(block, reader)


def try_block(block: Block, reader: Reader) -> None:
    if block.language in RUN and block.reason is None:
        reader.run(block)
    elif block.language in RUN:
        assert len(block.reason.split()) > 1, f"{block.name}: the marker gives no reason"
        reader.check(block)
    elif block.language == "yaml":
        check_yaml(block)
    elif block.language == "json":
        for line in block.text.splitlines() if block.text.startswith('{"') else [block.text]:  # JSONL or JSON
            json.loads(line)
    else:
        assert block.language in SHOWN, f"{block.name}: nobody knows how to check {block.language}"
        first = {line.removeprefix("$ ").partition(" ")[0] for line in block.text.splitlines()}
        assert not first & PROGRAMS.keys(), f"{block.name}: commands stand in ```bash"


def check_yaml(block: Block) -> None:
    """Options of a run, which it understands."""
    file = Path("page.yaml")
    file.write_text(block.text, "utf-8")
    assert read_config(file)


# -- Inline code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_in_its_text_exist(page):
    commands = [code for code in read_inline_code(page) if code.split(" ")[0] in PROGRAMS or code.startswith("--")]
    assert {code: unknown for code in commands if (unknown := unknown_options(code))} == {}


def unknown_options(code: str) -> list[str]:
    """The options that a command, or if none is named any of our commands, does not have."""
    words = code.split()
    options = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
    known = ALWAYS | frozenset().union(*map(flags, find_commands(words)))
    return sorted(options - known)


ALWAYS = {"--help", "--version", "--debug"}


def find_commands(words: list[str]) -> list[Command]:
    """The commands that may be meant. Raises KeyError if there is none of this name."""
    found: list[Program | Command] = list(PROGRAMS.values())
    if words[0] in PROGRAMS:
        found = [PROGRAMS[words[0]]]
        for word in words[1:]:
            if isinstance(found[0], Program) and re.match("[a-z]", word):
                found = [found[0].commands[word]]
    commands: list[Command] = []
    while found:
        first = found.pop()
        if isinstance(first, Program):
            found += first.commands.values()
        else:
            commands.append(first)
    return commands


@cache
def flags(command: Command) -> frozenset[str]:
    """Every spelling of the options of a command."""
    parser = tyro.extras.get_parser(command.options, registry=REGISTRY)
    return frozenset(itertools.chain.from_iterable(action.option_strings for action in parser._actions))


TRAINING = (ROOT / "docs/training.md").read_text("utf-8")


def test_options_of_a_run_that_are_named_exist():
    options = flatten(RunCommand(Path()))
    sections = {name.partition(".")[0] for name in options if "." in name}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)`", TRAINING)
    assert len(named) > 10
    unknown = [name for name in named if name not in options and not name.endswith(".yaml")]
    assert unknown == []


# -- Tables and links -------------------------------------------------------------------------------------------------


README = PAGES[0].read_text("utf-8")
OPTIONS = re.findall(r"^\| [^|]* \| ([^|]*`--[^|]*) \|$", README, flags=re.MULTILINE)
DATASETS = re.findall(r"^\| [^|]* \| (`--data [^|]* \| [^|]*) \|$", TRAINING, flags=re.MULTILINE)


@pytest.mark.parametrize("row", OPTIONS)
def test_the_table_of_options_is_understood(row):
    for options in re.findall(r"`(--[^`]*)`", row):
        assert understand("refalign", "generate", "--model", "m", *shlex.split(options.partition(",")[0]))


@pytest.mark.parametrize("row", DATASETS)
def test_the_table_of_datasets_is_understood(row):
    options = [word for options in re.findall(r"`(--[^`]* [^`]*)`", row) for word in shlex.split(options)]
    assert understand("refalign-train", "check", *options)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^):]+)\)", page.read_text("utf-8"))
    assert [link for link in links if not leads_somewhere(page, link)] == []


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if (
        heading and target.suffix == ".md" and target.parent.name != "api"
    ):  # whose headings `make docs` makes and checks
        return heading in anchors(target)
    return target.exists()


@cache
def anchors(page: Path) -> list[str]:
    """What GitHub calls the page's headings."""
    headings = re.findall(r"^##+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return [re.sub("[^a-z0-9_-]", "", heading.lower().replace(" ", "-")) for heading in headings]


# -- The tests themselves ---------------------------------------------------------------------------------------------


PAGE = """
{marker}
```{language}
{text}
```
"""


def blocks_of(folder: Path, **parts: str) -> list[Block]:
    page = folder / "page.md"
    page.write_text(PAGE.format(**{"marker": "", "language": "bash", "text": "refalign demo --list"} | parts), "utf-8")
    return read_blocks(page)


@pytest.mark.parametrize("text", ["<!-- not run: needs a GPU -->\n\nProse.\n", "```bash\nrefalign demo\n"])
def test_a_marker_or_a_fence_alone_is_found(text, tmp_path):
    (tmp_path / "page.md").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"page\.md"):
        read_blocks(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ({"text": "refalign demo --lists"}, SystemExit),
        ({"text": "refalign demo --lists", "marker": "<!-- not run: needs a GPU -->"}, SystemExit),
        ({"marker": "<!-- not run: -->"}, AssertionError),
        ({"text": "unheard --of"}, AssertionError),
        ({"text": "pip install .[unheard]"}, AssertionError),
        ({"text": "hf download ORG/NAME --unheard"}, Exception),
        ({"language": "ruby"}, AssertionError),
        ({"language": "text", "text": "$ refalign demo"}, AssertionError),
        ({"language": "python", "text": "import refalign.unheard"}, ImportError),
        (
            {"language": "python", "text": "from refalign import a", "marker": "<!-- not run: at all -->"},
            Exception,
        ),
        ({"language": "yaml", "text": "unheard: 1"}, ValueError),
    ],
)
def test_a_block_that_is_not_true_is_found(parts, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of(tmp_path, **parts)
    with pytest.raises(fault):
        try_block(block, Reader())

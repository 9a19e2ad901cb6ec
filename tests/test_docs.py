"""The docs site's own checks: what they find. `make docs` builds the site with them."""

import logging
import re
from pathlib import Path

import griffe
import pytest

from docs.scripts import house, messages, site_checks, site_links
from docs.scripts.docstrings import Docstrings


def test_the_build_ends_with_warnings():
    """With --quiet, mkdocs counts no warnings, and --strict would let all pass."""
    (command,) = re.findall("^\t.*mkdocs .*", (house.ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert command.endswith(" build --strict")


@pytest.fixture
def site(tmp_path):
    """A built site of two pages without a fault."""
    (tmp_path / "index.html").write_text('<a href="api/page.html#part">part</a> <a href="https://arxiv.org">paper</a>')
    (tmp_path / "api").mkdir()
    (tmp_path / "api/page.html").write_text('<h2 id="part">Part</h2><a href="../index.html">home</a><img src="a.png">')
    (tmp_path / "api/a.png").touch()
    return tmp_path


def test_a_site_that_is_whole_has_no_faults(site):
    assert site_checks.faults(site) == []


FAULTS = {
    '<a href="gone.html">': "index.html links gone.html, which the site does not have.",
    '<a href="api/page.html#gone">': "index.html links api/page.html#gone, which the site does not have.",
    '<a href="#gone">': "index.html links #gone, which the site does not have.",
    '<video poster="gone.png">': "index.html links gone.png, which the site does not have.",
    '<script src="https://a.example/b.js">': "index.html loads https://a.example/b.js from a foreign host.",
    '<img srcset="//a.example/b.png 2x">': "index.html loads //a.example/b.png from a foreign host.",
}


@pytest.mark.parametrize(("html", "fault"), FAULTS.items())
def test_a_fault_of_a_page_is_found(site, html, fault):
    (site / "index.html").write_text(html)
    assert site_checks.faults(site) == [fault]


@pytest.mark.parametrize("rule", ["a { background: url('https://a.example/b.png') }", '@import "//a.example/b.png";'])
def test_a_foreign_host_in_a_style_is_found(site, rule):
    (site / "style.css").write_text(rule)
    (fault,) = site_checks.faults(site)
    assert "style.css loads" in fault and "a.example/b.png" in fault


def test_links_to_files_of_the_repository_lead_to_pages_that_show_them():
    text = "[file](../../Makefile#L3), [page](../training.md), [gone](../../gone.py)"
    assert site_links.linked({"api/a.md": text}) == {"Makefile"}
    page = type("Page", (), {"file": type("File", (), {"src_uri": "api/a.md"})})
    shown = site_links.on_page_markdown(text, page, None, None)
    expected = "[file](../repository/Makefile.md), [page](../training.md), [gone](../../gone.py)"
    assert shown == expected


@pytest.mark.parametrize("link", ["../gone.py", "../../outside.md", "../benchmarks/README.md#gone"])
def test_a_link_to_what_is_not_there_is_a_warning(link, caplog):
    with caplog.at_level(logging.WARNING, "mkdocs.hooks.site_links"):
        site_links.linked({"a.md": f"[gone]({link}) [there](../benchmarks/README.md#opens2v-5ms-annotations)"})
    assert caplog.messages == [f"docs/a.md links {link}, which the repository does not have."]


def test_names_in_docstrings_become_links_and_types_lose_their_marks():
    code = 'import torch\n\ndef a(b):\n    """See [`torch`].\n\n    Args:\n        b (`int`, *optional*): A `c`."""\n'
    extensions = griffe.load_extensions(Docstrings)
    docstring = griffe.visit("module", None, code, extensions=extensions)["a"].docstring.value
    assert '<autoref optional identifier="torch"><code>torch</code></autoref>.' in docstring
    assert "b (int, optional): A `c`." in docstring


def test_the_house_is_drawn_as_it_is():
    drawn = Path(house.ROOT / "docs/house.svg").read_text("utf-8")
    assert drawn == house.draw(house.imports()), "Run: python docs/scripts/house.py docs/house.svg"


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"top": {"middle", "low"}, "middle": {"low"}, "low": set()}
    assert house.reduced(graph) == {"top": {"middle"}, "middle": {"low"}, "low": set()}
    assert house.floor(graph, "top") == 2


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(messages.all_texts())


QUOTES = re.findall(r"```text\n(.*?)```", (house.ROOT / "docs/troubleshooting.md").read_text("utf-8"), re.DOTALL)
QUOTED = "".join(QUOTES).splitlines()


def test_messages_that_the_page_quotes_are_said_by_the_code(texts):
    """A … of the page stands for one or more of the code's, and for what is around them."""
    assert len(QUOTED) > 50
    unknown = []
    for quote in QUOTED:
        parts = [re.escape(part.strip()) for part in quote.split(messages.ANY)]
        pattern = re.compile(".*".join(parts))
        if not any(pattern.search(text) for text in texts):
            unknown.append(quote)
    assert unknown == []


def test_the_page_of_all_messages_has_them():
    page = messages.error_messages()
    assert "- `` Pass exactly one of `prompt` and `prompt_embeds`. ``" in page
    assert "- `` … holds a run already. Pass --resume latest to go on, or another --output. ``" in page


def test_a_text_of_the_code_has_marks_for_what_differs():
    node = messages.ast.parse('f"a {b} " "c %s"').body[0].value
    assert messages.as_text(node) == "a … c %s"


# Width, feed-forward's width and layers, as in the table of the page
SIZES = {"1.3B": (1536, 8960, 30), "14B": (5120, 13824, 40)}


@pytest.mark.parametrize(("size", "references"), [("1.3B", 1), ("1.3B", 3), ("14B", 1), ("14B", 3)])
def test_reckoned_costs_follow_from_the_formula_of_the_page(size, references):
    page = (house.ROOT / "docs/memory-and-speed.md").read_text("utf-8")
    width, forward, layers = SIZES[size]
    video, tokens = 21 * 1560, (21 + references) * 1560
    linear = 4 * width**2 * tokens + 2 * width**2 * video + 1024 * width**2 + 2 * width * forward * tokens
    attention = 4 * layers * width * (tokens**2 + 512 * video)
    cost = 2 * layers * linear + attention
    row = f"| {references} | {tokens:,} | {cost / 1e15:.2f} | {attention / cost:.0%} | {150 * cost / 1e15:.0f} |"
    assert row.replace("%", " %") in page
    minutes = 150 * cost / 344e12 / 60
    assert references == 1 or f"| {size}, 3 references | {3 * cost / 344e12:.1f} s | {minutes:.1f} minutes |" in page

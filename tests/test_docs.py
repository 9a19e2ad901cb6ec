"""The docs site's own checks: what they find. `make docs` builds the site with them."""

import logging

import griffe
import pytest

from docs.scripts import site_checks, site_links
from docs.scripts.docstrings import Docstrings


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


def test_a_link_to_a_file_that_is_not_there_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "mkdocs.hooks.site_links"):
        site_links.linked({"a.md": "[gone](../gone.py)"})
    assert caplog.messages == ["docs/a.md links ../gone.py, which the repository does not have."]


def test_names_in_docstrings_become_links_and_types_lose_their_marks():
    code = 'import torch\n\ndef a(b):\n    """See [`torch`].\n\n    Args:\n        b (`int`, *optional*): A `c`."""\n'
    extensions = griffe.load_extensions(Docstrings)
    docstring = griffe.visit("module", None, code, extensions=extensions)["a"].docstring.value
    assert '<autoref optional identifier="torch"><code>torch</code></autoref>.' in docstring
    assert "b (int, optional): A `c`." in docstring

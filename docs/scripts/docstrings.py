"""An extension of griffe: reads docstrings as diffusers writes them, for mkdocstrings.

[`Name`] becomes a link where the name has a place in the API's pages, and types of arguments lose their backticks.
"""

import re
from typing import Any

import griffe


NAME = re.compile(r"\[`([\w.]+)`\](?![(\[])")
ARGUMENT = re.compile(r"^(\s*\w+ )\((.*`.*)\):", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = ARGUMENT.sub(lambda match: f"{match[1]}({re.sub('[`*]', '', match[2])}):", obj.docstring.value)
            obj.docstring.value = NAME.sub(lambda match: linked(obj, match[1]), text)


def linked(obj: griffe.Object, name: str) -> str:
    """A name as a link that autorefs drops if nothing has that address."""
    try:
        address = obj.resolve(name)
    except griffe.NameResolutionError:
        address = name
    return f'<autoref optional identifier="{address}"><code>{name}</code></autoref>'

"""YAML files of options: read within limits, so that a hostile one can do nothing but be refused."""

import re
from pathlib import Path
from typing import Any


# Far more than options need
MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 10_000
MAX_YAML_DEPTH = 20


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file of options; ValueError, naming it, if it is none."""
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1).decode("utf-8")
        _check_extent(text, path)
        content = yaml.load(text, with_exponents(yaml.SafeLoader))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options such as `steps: 1000`, but holds {content!r:.80}.")
    return content


def _check_extent(text: str, path: Path) -> None:
    """
    Raises ValueError for YAML that is too long, too deep, or too large once its aliases stand for what they name.

    Nothing is built of it, and the parser of events does not recurse.
    """
    import yaml

    if len(text.encode()) > MAX_YAML_BYTES:
        raise ValueError(f"{path} has more than {MAX_YAML_BYTES:,} bytes. Options need far fewer.")
    open_nodes: list[tuple[str | None, int]] = []
    sizes: dict[str | None, int] = {}
    total = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise ValueError(f"{path} has a value that holds itself (*{event.anchor}). Write it out.")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = total - before
        if total > MAX_YAML_VALUES or len(open_nodes) > MAX_YAML_DEPTH:
            raise ValueError(
                f"{path} has more than {MAX_YAML_VALUES:,} values or {MAX_YAML_DEPTH} levels. Options need far fewer."
            )


def with_exponents(kind: Any) -> Any:
    """A loader or dumper of YAML to which 1e-5 is a number, as in YAML 1.2."""
    kind = type(kind.__name__, (kind,), {})
    kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), None)
    return kind

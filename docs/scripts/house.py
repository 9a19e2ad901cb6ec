"""Draws docs/house.svg, the house as a picture: which room imports which, read from the code.

    python docs/scripts/house.py docs/house.svg

An arrow that other arrows already make plain (a imports c, where a imports b and b imports c) is left out.
"""

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path


ROOT = Path(__file__).parents[2]
# Each room with what it is for; where two fit, the longer name is a module's room
ROOMS = {
    "refalign": ("refalign", "pipeline, references, LoRAs, Hub"),
    "refalign_training.method": ("method", "losses, alignment, teachers"),
    "refalign_training.data": ("data", "source to Sample to pixels"),
    "refalign_training.cache": ("cache", "pixels to tensors on the disk"),
    "refalign_training.run": ("run", "tensors to trained weights"),
    "refalign_training.publish": ("publish", "weights to a repo"),
    "refalign_training.sprites": ("sprites", "the small world"),
    "refalign_training.cli": ("refalign-train", "the command line"),
    "refalign_evaluation": ("refalign_evaluation", "videos to numbers"),
}
FOLDERS = {"refalign": "pipelines", "refalign_training": "training", "refalign_evaluation": "evaluation"}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 230, 58, 40, 44, 24

Graph = dict[str, set[str]]


def imports() -> Graph:
    """The rooms that each room's modules import, at the top or inside of functions."""
    graph: Graph = {room: set() for room in ROOMS}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            room = room_of(module)
            if room is None or "sprites/model" in path.as_posix():  # the code as a Hub repo carries it
                continue
            found = {room_of(name) for name in imported(path)}
            graph[room] |= {name for name in found if name is not None} - {room}
    return graph


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    fitting = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


def reduced(graph: Graph) -> Graph:
    """The graph without the arrows that go the way of others."""
    slim = {}
    for room, below in graph.items():
        beyond: set[str] = set()
        for name in below:
            beyond |= reach(graph, name)
        slim[room] = below - beyond
    return slim


def reach(graph: Graph, room: str) -> set[str]:
    below = set(graph[room])
    for name in graph[room]:
        below |= reach(graph, name)
    return below


def floor(graph: Graph, room: str) -> int:
    """How many floors are below a room."""
    return 1 + max((floor(graph, name) for name in graph[room]), default=-1)


def draw(graph: Graph) -> str:
    """The picture as SVG: importers above what they import. It has a background of its own, for dark pages too."""
    floors: dict[int, list[str]] = {}
    for room in graph:
        floors.setdefault(floor(graph, room), []).append(room)
    columns = max(map(len, floors.values()))
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP_X
    height = 2 * MARGIN + len(floors) * HEIGHT + (len(floors) - 1) * GAP_Y
    places = {}
    for number, rooms in floors.items():
        taken = len(rooms) * WIDTH + (len(rooms) - 1) * GAP_X
        for column, room in enumerate(rooms):
            x = (width - taken) // 2 + column * (WIDTH + GAP_X)
            places[room] = (x, height - MARGIN - HEIGHT - number * (HEIGHT + GAP_Y))
    parts = []
    for room, below in reduced(graph).items():
        parts += [arrow(places[room], places[name]) for name in sorted(below)]
    parts += [box(room, places[room]) for room in graph]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" text-anchor="middle">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#455"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="12" fill="#fff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + WIDTH // 2, start[1] + HEIGHT, end[0] + WIDTH // 2, end[1] - 2
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#455" stroke-width="1.6" marker-end="url(#tip)"/>'


def box(room: str, place: tuple[int, int]) -> str:
    name, purpose = map(escape, ROOMS[room])
    x, y = place
    fill = {"refalign": "#d7e8ff", "refalign_evaluation": "#ffe9cc"}.get(room, "#dff3e1")
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="#455"/>'
        f'<text x="{x + WIDTH // 2}" y="{y + 25}" font-size="17" font-weight="bold" fill="#123">{name}</text>'
        f'<text x="{x + WIDTH // 2}" y="{y + 45}" font-size="13" fill="#234">{purpose}</text>'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(imports()), "utf-8")

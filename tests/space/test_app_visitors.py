"""Many visitors at once, by gradio_client and by bare requests: all are served, and nobody gets what is not theirs."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from refalign.sprites import SUBJECTS
from refalign.video import read_settings, read_video
from tests.space.conftest import PATIENCE


VISITORS = 20
SUBJECT = SUBJECTS / "red-square.png"
QUICK = {"num_frames": 1, "steps": 1}
SIZE = "64x64"


@pytest.fixture
def client(server, tmp_path):
    with closing(connect(server, tmp_path)) as client:
        yield client


def connect(server, folder: Path) -> Client:
    return Client(server.url, download_files=folder, verbose=False, analytics_enabled=False)


def generate(client: Client, **settings) -> tuple[Path, dict]:
    """The video, and what is said of its settings."""
    made, kept, _ = client.predict(**{"prompt": "It grows in the snow.", **QUICK, **settings}, api_name="/generate")
    return Path(made["video"] if isinstance(made, dict) else made), json.loads(kept)


def test_a_program_makes_a_video(client):
    client.predict([handle_file(SUBJECT)], SIZE, api_name="/add_references")
    video, kept = generate(client, count=1, num_frames=5, seed=7)
    assert read_video(video).shape == (5, 64, 64, 3)
    assert read_settings(video) == kept
    assert (kept["seed"], kept["reference"]) == (7, [SUBJECT.name])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompt": " "}, "The prompt is missing"),
        ({"count": 3}, "The references are gone"),
        ({"num_frames": 4}, "`num_frames` must be 4k + 1, but is 4. Nearest: 5."),
        ({"size": "9999x9999"}, "not in the list of choices"),
        ({"steps": 10**6}, "greater than maximum"),
    ],
)
def test_wrong_requests_are_told_what_is_right(client, settings, told):
    with pytest.raises(AppError, match=told.replace("`", ".").replace("+", ".")) as error:
        generate(client, **settings)
    assert "/" not in str(error.value)  # no path


def test_only_what_visitors_need_can_be_called(client):
    assert client.view_api(return_format="dict")["named_endpoints"].keys() == {"/add_references", "/generate"}


def test_twenty_visitors_are_all_served_with_their_own(server, tmp_path):
    def visit(number: int) -> tuple[int, dict, str]:
        with closing(connect(server, tmp_path / str(number))) as client:
            if number % 2:
                client.predict([handle_file(SUBJECT)], SIZE, api_name="/add_references")
            video, kept = generate(client, count=number % 2, seed=number)
            return number, kept, str(read_video(video).sum())

    with ThreadPoolExecutor(VISITORS) as pool:
        visits = list(pool.map(visit, range(VISITORS)))
    assert [kept["seed"] for _, kept, _ in visits] == list(range(VISITORS))
    assert [len(kept["reference"]) for _, kept, _ in visits] == [number % 2 for number in range(VISITORS)]
    assert len({pixels for *_, pixels in visits}) == VISITORS


# -- What is not for visitors -----------------------------------------------------------------------------------------


@pytest.fixture
def stored(server, client) -> Path:
    """Where the server keeps another visitor's reference."""
    client.predict([handle_file(SUBJECT)], SIZE, api_name="/add_references")
    return next(server.folder.glob(f"refalign-app-*/visits/*/*/{SUBJECT.name}"))


def fetch(server, path: object) -> httpx.Response:
    return httpx.get(f"{server.url}/gradio_api/file={path}", timeout=PATIENCE)


def call(server, name: str, *data: object) -> str:
    """What the server answers to a call by bare requests."""
    url = f"{server.url}/gradio_api/call/{name}"
    event = httpx.post(url, json={"data": data}, timeout=PATIENCE).json()["event_id"]
    return httpx.get(f"{url}/{event}", timeout=PATIENCE).text


def test_no_file_of_the_server_or_of_another_visitor_is_served(server, stored):
    paths = ["/etc/passwd", "/proc/self/environ", Path(__file__), server.log, stored]
    gradio = next(server.folder.glob("refalign-app-*/gradio"))
    paths += [f"{gradio}/../visits/{stored.relative_to(gradio.parent / 'visits')}", gradio, "pyproject.toml"]
    answers = {str(path): fetch(server, path).status_code for path in paths}
    assert set(answers.values()) <= {403, 404}, answers


def test_anothers_reference_cannot_be_passed_as_ones_own(server, stored):
    answer = call(server, "add_references", [file_data(stored)], SIZE)
    assert "event: error" in answer and "Traceback" not in answer


def file_data(path: object) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_the_server_fetches_no_url(server):
    url = "https://example.com/cat.png"
    told = "URLs are not fetched"
    assert told in fetch(server, url).text
    assert told in httpx.get(f"{server.url}/gradio_api/proxy={url}", timeout=PATIENCE).text
    assert told in call(server, "add_references", [file_data(url)], SIZE)
    assert told in call(server, "generate", 0, file_data(url), SIZE, 1, 1, 3, 3, 0)


def test_what_a_visitor_sent_goes_when_the_visitor_has_gone(server, tmp_path):
    before = visits(server)
    with closing(connect(server, tmp_path)) as client:
        client.predict([handle_file(SUBJECT)], SIZE, api_name="/add_references")
        (own,) = visits(server) - before
    until = time.monotonic() + PATIENCE
    while own.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not own.exists()


def visits(server) -> set[Path]:
    return set(server.folder.glob("refalign-app-*/visits/*"))

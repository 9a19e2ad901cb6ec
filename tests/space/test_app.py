"""The app in a browser, as visitors use it, and many visitors at once, by gradio_client and by bare requests.

Screenshots are left in pytest's temporary folder. All of it stands in one file, and so has one server.
"""

import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect

from refalign import prepare_reference_images
from refalign.sprites import SUBJECTS
from refalign.video import read_settings, read_video
from tests.space.conftest import PATIENCE


STAR, HEART = SUBJECTS / "crowned-star.png", SUBJECTS / "yellow-heart.png"
PROMPT = "On the left one hops up and down, on the right one spins around, in a meadow."
PHONE = {"width": 390, "height": 844}
VISITORS = 20
SUBJECT = SUBJECTS / "red-square.png"
QUICK = {"num_frames": 1, "steps": 1}
SIZE = "64x64"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def size() -> dict[str, int]:
    """Of the window; a test may name another."""
    return {"width": 1280, "height": 900}


@pytest.fixture
def page(server, browser, size):
    context = browser.new_context(viewport=size, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    expect.set_options(timeout=PATIENCE * 1000)
    page.goto(server.url)
    button(page, "Generate").wait_for()
    yield page
    context.close()


def button(page: Page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def preview(page: Page, number: int):
    return page.get_by_alt_text(f"Reference {number}, as the model sees it")


def status(page: Page):
    return page.locator("#status p")


def add(page: Page, *files) -> None:
    page.locator("input[type=file]").first.set_input_files(files)


def make_quick(page: Page, steps: int = 1, frames: int = 5) -> None:
    """Sets what a test has no time for."""
    page.locator("#settings > button").click()
    for label, value in (("Frames", frames), ("Steps", steps)):
        field, slider = (page.get_by_role(role, name=re.compile(label)) for role in ("spinbutton", "slider"))
        while slider.input_value() != str(value):  # just opened, they may not hear what is typed yet
            field.fill(str(value))
            field.blur()


def pixels(page: Page, number: int) -> np.ndarray:
    """What a preview shows."""
    answer = page.request.get(preview(page, number).get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def test_two_references_become_a_video(page, shots):
    add(page, STAR, HEART)
    preview(page, 2).wait_for()
    star, heart = prepare_reference_images([STAR, HEART], 64, 64, cut_out=False)
    assert np.array_equal(pixels(page, 1), star) and np.array_equal(pixels(page, 2), heart)
    page.locator("#prompt textarea").fill(PROMPT)
    make_quick(page)
    button(page, "Generate").click()
    expect(status(page)).to_contain_text("Made in")
    video = page.locator("#made video")
    video.wait_for()
    video.evaluate("video => video.play()")
    page.wait_for_function("document.querySelector('#made video').currentTime > 0")
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [64, 64]
    page.screenshot(path=shots / "light.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=shots / "dark.png", full_page=True)
    with page.expect_download() as download:
        page.locator("#made").get_by_role("button", name="Download").or_(
            page.locator("#made a[download]")
        ).first.click()
    download.value.save_as(shots / "video.mp4")
    settings = read_settings(shots / "video.mp4")
    assert settings["reference"] == [STAR.name, HEART.name]
    assert (settings["prompt"], settings["steps"], settings["num_frames"]) == (PROMPT, 1, 5)
    with page.expect_download() as download:
        page.locator("#kept a[download]").first.click()
    assert json.loads(download.value.path().read_text()) == settings


def test_references_are_reordered_and_removed(page):
    add(page, STAR, HEART)
    preview(page, 2).wait_for()
    star, heart = pixels(page, 1), pixels(page, 2)
    before = preview(page, 1).get_attribute("src")
    button(page, "Move 2 up").click()
    expect(preview(page, 1)).not_to_have_attribute("src", before)
    assert np.array_equal(pixels(page, 1), heart) and np.array_equal(pixels(page, 2), star)
    button(page, "Remove 1").click()
    expect(preview(page, 2)).to_be_hidden()
    assert np.array_equal(pixels(page, 1), star)


def test_a_run_is_cancelled_and_the_next_one_made(page):
    button(page, "A square grows").click()
    preview(page, 1).wait_for()
    make_quick(page, steps=100, frames=17)
    button(page, "Generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 100, .* left")).wait_for()
    button(page, "Cancel").click()
    expect(status(page)).to_contain_text("Cancelled.")
    page.get_by_role("spinbutton", name=re.compile("Steps")).fill("1")
    button(page, "Generate").click()
    expect(status(page)).to_contain_text("Made in")


def test_one_who_waits_can_leave_the_queue(server, page, browser):
    make_quick(page, steps=100, frames=17)
    page.locator("#prompt textarea").fill(PROMPT)
    button(page, "Generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 100")).wait_for()
    with closing(browser.new_context()) as context:
        other = context.new_page()
        other.goto(server.url)
        other.locator("#prompt textarea").fill(PROMPT)
        button(other, "Generate").click()
        other.get_by_text(re.compile("queue: ")).wait_for()
        button(other, "Cancel").click()
        expect(status(other)).to_contain_text("Cancelled.")
        expect(other.get_by_text(re.compile("queue: "))).to_be_hidden()
    button(page, "Cancel").click()
    expect(status(page)).to_contain_text("Cancelled.")


def test_bad_files_are_told_by_name_and_the_good_one_is_kept(page, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    add(page, tmp_path / "words.png", STAR, tmp_path / "huge.png")
    page.get_by_text("words.png is not an image. Take a PNG, JPEG or WebP file.").wait_for()
    page.get_by_text("huge.png has 9000x9000 pixels; 50 million are allowed.").wait_for()
    preview(page, 1).wait_for()
    expect(preview(page, 2)).to_be_hidden()


def test_a_missing_prompt_and_a_fifth_reference_are_told(page):
    button(page, "Generate").click()
    page.get_by_text("The prompt is missing").wait_for()
    add(page, STAR, HEART, STAR, HEART, STAR)
    page.get_by_text("there can be 4 references").wait_for()
    preview(page, 4).wait_for()


@pytest.mark.parametrize("size", [PHONE])
def test_it_goes_by_keyboard_alone_on_a_phone(page, size, shots):
    """Every stop is reached by Tab, every action done by Enter or by typing."""
    page.on("filechooser", lambda chooser: chooser.set_files([STAR]))
    tab_to(page, "Click to Upload")
    page.keyboard.press("Enter")
    preview(page, 1).wait_for()
    tab_to(page, "What happens, and where")
    page.keyboard.type("It hops up and down in a meadow.")
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "Steps")
    page.keyboard.press("Control+A")
    page.keyboard.type("1")
    page.screenshot(path=shots / "phone-settings.png", full_page=True)
    tab_to(page, "Generate")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("Made in")
    page.screenshot(path=shots / "phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def tab_to(page: Page, words: str) -> None:
    """Presses Tab until what has the focus is called so."""
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(FOCUSED)
        if words in name:
            return
    raise AssertionError(f"Tab does not come to {words!r}; it is at {name!r}")


FOCUSED = """() => {
    const focused = document.activeElement
    if (focused === document.body) return ""
    const label = focused.labels && focused.labels[0] ? focused.labels[0].innerText : ""
    return [focused.getAttribute("aria-label"), label, focused.innerText].join(" ")
}"""


# -- Many visitors, by programs ---------------------------------------------------------------------------------------


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


def test_the_reference_of_another_visitor_cannot_be_passed(server, stored):
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

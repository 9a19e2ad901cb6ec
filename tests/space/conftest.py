"""A server of the app in a process of its own, as `refalign app` is one, and a browser."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from httpx._transports import default as transports

from refalign.cli import main
from tests.programs import start


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 90  # seconds; on a busy machine everything takes long
START = 240  # seconds that the server may take to start


@pytest.fixture(scope="package", autouse=True)
def certificates_read_once() -> Iterator[None]:
    """Each request of gradio_client reads all certificates, though no server here has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", cache(transports.create_ssl_context))
        yield


@pytest.fixture(scope="package", params=["fork", pytest.param("fresh", marks=pytest.mark.slow)])
def server(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """`url`, and `folder`: the temporary folder of the server's process."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Under gradio's own test switch, what a visitor left behind goes a second after the visit, not an hour
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_IS_E2E_TEST": "1"}
    log = folder / "log.txt"
    words = ["app", "--port", str(port)]
    work = partial(main, words)
    if request.param == "fresh":
        work = partial(os.execv, sys.executable, [sys.executable, "-m", "refalign.cli", *words])
    with log.open("w") as opened:
        process = start(work, opened, opened, environment)
    try:
        _wait_for(url, process, log)
        yield SimpleNamespace(url=url, folder=folder, log=log)
        process.terminate()
        until = time.monotonic() + PATIENCE
        while (left := list(folder.glob("refalign-app-*"))) and time.monotonic() < until:
            time.sleep(0.1)
        assert left == []  # the files of all visits went with it
        assert "A request failed" not in log.read_text()  # what no visitor can mend
    finally:
        process.kill()  # what is left of its end is Python's own tidying, which takes seconds
        process.join()


def _wait_for(url: str, process: BaseProcess, log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until and process.is_alive():
        try:
            urlopen(url).close()
            return
        except URLError:
            time.sleep(0.2)
    raise AssertionError(f"The app does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="package")
def browser() -> Iterator:
    """Chromium without a window. Where there is none, tests are skipped, but CI must have one."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        reason = "NO BROWSER: the app is not tested. Install one of: " + ", ".join(BROWSERS)
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()

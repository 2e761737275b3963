"""The page of ``rae-xla serve``: over HTTP, as a command, and in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright
from tiny import environment
from tiny_text_to_image import write_tiny_text_to_image

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.sample.pipeline import load_pipeline
from rae_xla.sample.tiny_model import write_tiny_model
from rae_xla.tools.serve.jobs import MAX_WAITING, Jobs, Request
from rae_xla.tools.serve.models import _classes, served_model
from rae_xla.tools.serve.server import check_host, make_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ASKED = {"text": "a cat", "guidance": 1, "steps": 2, "seed": 3, "images": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_to_image(tmp_path_factory.mktemp("t2i"))


@pytest.fixture(scope="module")
def pipeline(saved: Path) -> Any:
    return load_pipeline(saved, overrides=["runtime.backend=torch"], num_steps=2)


class Site:
    """A server in a thread, and what asks it."""

    def __init__(self, pipeline: Any, token: str | None = None) -> None:
        model = served_model("tiny", pipeline)
        self.jobs = Jobs(model.generate, model.check, model.settings)
        self.server = make_server("127.0.0.1", 0, model, self.jobs, token)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} | headers
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, dict(answer.getheaders())

    def wait(self, key: str) -> dict[str, Any]:
        while True:
            status = json.loads(self.ask("GET", f"/jobs/{key}")[1])
            if status["state"] in ("done", "failed"):
                return status
            time.sleep(0.01)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.jobs.close()


@pytest.fixture(scope="module")
def site(pipeline: Any) -> Iterator[Site]:
    opened = Site(pipeline)
    yield opened
    opened.close()


def test_prompt_becomes_the_images_of_the_pipeline(site: Site, pipeline: Any) -> None:
    key = json.loads(site.ask("POST", "/jobs", ASKED)[1])["key"]
    status = site.wait(key)
    assert (status["state"], status["done"], status["settings"]) == ("done", 2, ASKED)
    expected, _ = pipeline.generate(["a cat"], 2, seed=3)
    from io import BytesIO

    from PIL import Image

    for path, pixels in zip(status["images"], expected, strict=True):
        code, content, headers = site.ask("GET", f"/{path}")
        assert (code, headers["Content-Type"]) == (200, "image/png")
        assert np.array_equal(np.asarray(Image.open(BytesIO(content))), pixels)
    manifest = json.loads(site.ask("GET", f"/{status['manifest']}")[1])
    assert manifest["request"] == ASKED
    assert set(manifest["weights"]) == {"text_to_image", "encoder", "decoder"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "   "}, "is empty"),
        ({"text": "a" * 10_000}, "10,000 characters"),
        ({"text": None}, "the prompt is missing"),
        ({"images": 17}, "images must be a whole number from 1 to 16"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"guidance": float("nan")}, "guidance must be a number from 1 to 100"),
        ({"seed": True}, "seed must be a whole number"),
    ],
)
def test_mistakes_are_answered_clearly(site: Site, change: dict[str, Any], message: str) -> None:
    code, content, _ = site.ask("POST", "/jobs", ASKED | change)
    assert code == 200
    assert message in json.loads(content)["error"]


def test_other_requests_are_refused(site: Site) -> None:
    assert site.ask("POST", "/jobs", ASKED, **{"Content-Type": "text/plain"})[0] == 400
    assert site.ask("POST", "/jobs", "x" * (1 << 19))[0] == 400
    assert site.ask("POST", "/jobs", [1])[1] == b'{"error": "the request is not a JSON object"}'
    assert site.ask("GET", "/", Host="evil.example")[0] == 403  # DNS rebinding
    for path in ("/jobs/" + "0" * 32, "/images/" + "0" * 32 + "/0.png", "/../server.py", "/x"):
        assert site.ask("GET", path)[0] == 404
    assert "default-src 'none'" in site.ask("GET", "/")[2]["Content-Security-Policy"]


def test_token_is_needed_beyond_this_machine(pipeline: Any) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match="give --token"):
            check_host(host, None)
        with pytest.raises(UserError, match="at least 8"):
            check_host(host, "short")
        check_host(host, "long enough")
    check_host("localhost", None)
    with pytest.raises(UserError, match="not an address"):
        check_host("no such host", None)
    site = Site(pipeline, token="secret words")
    try:
        assert site.ask("GET", "/")[0] == 401
        assert site.ask("GET", "/?token=wrong")[0] == 401
        code, _, headers = site.ask("GET", "/?token=secret%20words")
        assert code == 200
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert site.ask("GET", "/model", Cookie=cookie)[0] == 200
        assert site.ask("POST", "/jobs", ASKED)[0] == 401
    finally:
        site.close()


def test_requests_wait_in_turn_and_too_many_are_refused() -> None:
    free, order = threading.Event(), []

    def generate(request: Request, report: Any) -> Any:
        free.wait(60)
        order.append(request.seed)
        return np.zeros((1, 2, 2, 3), np.uint8)

    jobs = Jobs(generate, lambda text: None, {})
    first = jobs.submit(Request("a", 1, 1, 0, 1))
    while first.state != "running":
        time.sleep(0.001)
    waiting = [jobs.submit(Request("a", 1, 1, i + 1, 1)) for i in range(MAX_WAITING)]
    assert jobs.status(waiting[2])["before"] == 3
    with pytest.raises(UserError, match="waiting already"):
        jobs.submit(Request("a", 1, 1, 99, 1))
    free.set()
    while waiting[-1].state != "done":
        time.sleep(0.001)
    assert order == list(range(MAX_WAITING + 1))
    jobs.close()


def test_classes_of_a_class_conditional_model(tmp_path: Path) -> None:
    loaded = load_pipeline(write_tiny_model(tmp_path), overrides=["runtime.backend=torch"])
    site = Site(loaded)
    try:
        assert json.loads(site.ask("GET", "/model")[1])["kind"] == "class"
        wrong = json.loads(site.ask("POST", "/jobs", ASKED | {"text": "no such class"})[1])
        assert "there is no class" in wrong["error"] or "give its number" in wrong["error"]
        asked = ASKED | {"text": "golden retriever, 388", "images": 1, "guidance": 1.5}
        key = json.loads(site.ask("POST", "/jobs", asked)[1])["key"]
        assert site.wait(key)["state"] == "done"
    finally:
        site.close()


def test_numbers_are_names_where_classes_are_called_so() -> None:
    assert _classes("3, tench", ["tench", "shark"]) == [3, "tench"]
    assert _classes("3, 1", ["1", "3"]) == ["3", "1"]
    assert _classes("9" * 5000, ["tench"]) == ["9" * 5000]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**30, 10**400, "text", None])
@pytest.mark.parametrize("name", ["guidance", "steps", "seed", "images"])
def test_numbers_of_a_request(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{name} must be a"):
        Request.parse(ASKED | {name: value})


@pytest.mark.slow
def test_command_prints_its_address_and_frees_the_port(saved: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", "--model", str(saved), "--port", str(port), "runtime.backend=torch"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rae_xla", *command],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_wrong_address_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--model", "scale-rae-qwen1.5b", "--host", "0.0.0.0"]) == 2
    assert "give --token" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


def open_page(browser: Any, url: str, width: int) -> tuple[Any, list[str]]:
    page, messages = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(url)
    # `wait_for_function` would evaluate strings in the page, which its policy forbids.
    expect(page.locator("#steps")).not_to_have_value("")
    return page, messages


@pytest.mark.slow
def test_page_in_a_browser(browser: Any, site: Site, tmp_path: Path) -> None:
    pages = [open_page(browser, site.url, width) for width in (1280, 390)]
    for page, _ in pages:  # both tabs ask at once
        page.fill("#text", "a red square")
        page.fill("#images", "2")
        page.fill("#seed", "7")
        page.click("#go")
    for (page, messages), width in zip(pages, (1280, 390), strict=True):
        page.wait_for_selector("#result:not([hidden])", timeout=120_000)
        expect(page.locator("img")).to_have_count(2)
        for image in page.locator("img").all():
            expect(image).to_have_js_property("complete", True)
            assert image.evaluate("image => image.naturalWidth") > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#message").inner_text() == "Done: 2 images."
        assert json.loads(page.locator("#settings").inner_text())["seed"] == 7
        href = page.locator("#manifest").get_attribute("href")
        assert re.fullmatch(r"manifests/[0-9a-f]{32}\.json", href)
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        for text, answer in (("a" * 10_000, "10,000 characters"), ("  ", "prompt is empty")):
            page.fill("#text", text)
            page.click("#go")
            page.wait_for_selector("#message.bad")
            assert answer in page.locator("#message").inner_text()
        page.fill("#text", "a")
        page.fill("#steps", "0")
        page.click("#go")
        assert "Steps must be a number from 1 to 1000" in page.locator("#message").inner_text()
        assert messages == []

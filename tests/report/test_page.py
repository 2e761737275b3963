"""The page of real runs, opened in a browser that must find nothing to ask a network for."""

import json
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from tiny import make_configs, make_shards, rae_xla

from rae_xla.errors import UserError
from rae_xla.report.page import render, thin, write_page
from rae_xla.report.pictures import MOST, spread
from rae_xla.report.runs import read_run, read_runs
from rae_xla.sample.pictures import save_png

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SLIDE = "s => { s.value = 0; s.dispatchEvent(new Event('input')) }"


def write_run(folder, lines, pictures=(), config="training: {steps: 9}\n"):
    """A results folder as a run leaves it."""
    (folder / "samples").mkdir(parents=True)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text(config)
    for step in pictures:
        save_png(folder / f"samples/stage2-{step:08d}.png", np.full((8, 20, 3), step, np.uint8))
    return folder


def curve(steps):
    return [{"step": s, "train/loss": 2 / s, "perf/images_per_second": 90.0 + s} for s in steps]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


def open_page(browser, path, width=1280):
    """The page, and what it said on the console, threw or asked for."""
    page, noise = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("data:") else noise.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#main section, #main .note")
    return page, [text for text in noise if text != path.as_uri()]


@pytest.mark.slow
def test_two_real_runs_in_a_browser(browser, tmp_path):
    configs = make_configs(tmp_path, make_shards(tmp_path))
    for name, rate in (("fast", 2e-3), ("slow", 1e-4)):
        done = rae_xla(
            "train", "stage2", "--config", configs["stage2"], "--results-dir", tmp_path / name,
            f"training.optimizer.lr={rate}", "training.steps=16", "training.sample_every=8",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    out = tmp_path / "page.html"
    done = rae_xla("report", tmp_path / "fast", tmp_path / "slow", "--out", out)
    assert done.returncode == 0, done.stderr
    for width in (1280, 390):
        page, noise = open_page(browser, out, width)
        assert noise == []
        assert page.evaluate("document.documentElement.scrollWidth") == width, "no sideways scroll"
        assert page.locator(".chart").first.bounding_box()["width"] > 300
    headings = page.locator("h2").all_inner_texts()
    assert headings[:2] == ["Training", "Samples over time"]
    assert page.locator(".chart:has-text('train/loss') path.smooth").count() == 2
    images = page.locator(".picture img")
    assert images.evaluate_all("all => all.every(i => i.naturalWidth > 100)")
    assert page.locator("table:has-text('training.optimizer.lr') td").all_inner_texts()[:2] == [
        "0.002",
        "0.0001",
    ]

    environment = page.locator("tr:has(th:text-is('global batch')) td")
    assert environment.all_inner_texts() == ["8", "8"]

    before = images.first.get_attribute("src")
    page.locator(".stepper input").evaluate(SLIDE)
    assert page.locator(".stepper output").inner_text() == "step 0"
    assert images.first.get_attribute("src") != before

    path = page.locator(".chart:has-text('train/loss') path.smooth").first
    shapes = [path.get_attribute("d")]
    for action in (
        "document.getElementById('log').click()",
        f"({SLIDE})(document.getElementById('smoothing'))",
    ):
        page.evaluate(action)
        shapes.append(path.get_attribute("d"))
    assert len(set(shapes)) == 3, "log scale and smoothing redraw the curve"

    chart = page.locator(".chart:has-text('train/loss') svg")
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert "step" in page.locator(".tip:visible").inner_text()
    assert "fast" in page.locator(".tip:visible").inner_text()
    tip, frame = page.locator(".tip:visible").bounding_box(), chart.bounding_box()
    assert tip["y"] + tip["height"] == pytest.approx(frame["y"] + 6, abs=2), "over the caption"
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip:visible div").first.inner_text().startswith("step ")

    page.locator("#run-0").click()
    assert page.locator(".chart:has-text('train/loss') path.smooth").count() == 1
    assert noise == []


@pytest.mark.slow
def test_a_name_that_is_html_stays_text(browser, tmp_path):
    folder = write_run(tmp_path / "<b>x</b><script>alert(1)<", curve([1, 2]))
    out = tmp_path / "page.html"
    write_page(read_runs([folder]), out)
    page, noise = open_page(browser, out)
    assert noise == []
    assert page.locator("h1").inner_text() == folder.name


@pytest.mark.slow
def test_a_run_without_steps_is_shown_as_such(browser, tmp_path):
    write_run(tmp_path / "begun", [], config="}{")
    write_run(tmp_path / "cut", [*curve([5, 10]), '{"step": 15, "train/lo'])
    out = tmp_path / "page.html"
    write_page(read_runs([tmp_path / "begun", tmp_path / "cut"]), out)
    page, noise = open_page(browser, out)
    assert noise == []
    assert page.locator(".run").first.locator(".note").inner_text() == "No steps yet."
    assert page.locator("footer li").all_inner_texts() == [
        "begun: config.yaml is missing or cannot be read",
        "begun: metrics.jsonl has no figures yet",
        "cut: metrics.jsonl: 1 lines cannot be read and are left out",
    ]


def test_of_a_step_logged_twice_the_later_counts_and_nan_is_left_out(tmp_path):
    lines = [
        *curve([1, 2]),
        {"step": 2, "train/loss": 5.0},
        {"step": 3, "train/loss": float("nan")},
    ]
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.figures["train/loss"] == {1: 2.0, 2: 5.0}
    assert run.last_step == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "there is no such folder"),
        (lambda folder: folder.mkdir(), "give the --results-dir of `rae-xla train`"),
        (lambda folder: write_run(folder / "inner", []), "there is one in inner: give "),
    ],
)
def test_a_folder_that_is_no_runs(make, says, tmp_path):
    make(tmp_path / "results")
    with pytest.raises(UserError, match=says):
        read_runs([tmp_path / "results"])


def test_runs_of_the_same_name_are_told_apart_and_one_given_twice_is_one(tmp_path):
    folders = [write_run(tmp_path / name / "run", curve([1])) for name in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_long_curves_become_means_and_many_pictures_a_few(tmp_path):
    steps, values = thin({step: float(step % 2) for step in range(1, 1001)}, most=100)
    assert len(steps) == len(values) == 100
    assert steps[-1] == 1000
    assert values == [0.5] * 100
    run = read_run(write_run(tmp_path / "run", curve([1]), range(0, 100)))
    shown = [picture.step for picture in spread(run.pictures)]
    assert len(shown) == MOST
    assert (shown[0], shown[-1]) == (0, 99)
    page = render([run])
    assert page.count("data:image/png;base64") == MOST
    assert "24 of 100 pictures are shown" in page


def test_a_picture_that_is_none_is_left_out_and_said(tmp_path):
    folder = write_run(tmp_path / "run", curve([1]), [0])
    (folder / "samples/stage2-00000007.png").write_bytes(b"no picture")
    assert "stage2-00000007.png cannot be read as a picture" in render([read_run(folder)])


def test_nothing_is_left_of_a_page_that_cannot_be_written(tmp_path):
    runs = [read_run(write_run(tmp_path / "run", curve([1])))]
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError, match=r"page\.html"):
        write_page(runs, tmp_path / "page.html")
    assert list(tmp_path.glob("*.unfinished")) == []

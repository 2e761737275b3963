"""The report page, opened in a browser that must make no network request."""

import json
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from tiny import make_configs, make_shards, rae_xla

from rae_xla.errors import UserError
from rae_xla.sample.images import save_png
from rae_xla.tools.report.images import MAX_IMAGES, select_evenly
from rae_xla.tools.report.page import epochs_to_fid, page_data, render, thin, write_page
from rae_xla.tools.report.runs import read_run, read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SLIDE = "s => { s.value = 0; s.dispatchEvent(new Event('input')) }"


def write_run(folder, lines, image_steps=(), config="training: {steps: 9}\n"):
    """Write a results folder with the given metrics and one sample image per step."""
    (folder / "samples").mkdir(parents=True)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text(config)
    for step in image_steps:
        save_png(folder / f"samples/stage2-{step:08d}.png", np.full((8, 20, 3), step, np.uint8))
    return folder


def curve(steps):
    return [{"step": s, "train/loss": 2 / s, "perf/images_per_second": 90.0 + s} for s in steps]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


def open_page(browser, path, width=1280):
    """Return the page, and its console messages, errors and requests."""
    page, messages = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("data:") else messages.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#main section, #main .note")
    return page, [text for text in messages if text != path.as_uri()]


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
        page, messages = open_page(browser, out, width)
        assert messages == []
        assert page.evaluate("document.documentElement.scrollWidth") == width, (
            "no horizontal scrolling"
        )
        assert page.locator(".chart").first.bounding_box()["width"] > 300
    headings = page.locator("h2").all_inner_texts()
    assert headings[:2] == ["Training", "Samples over time"]
    assert page.locator(".chart:has-text('train/loss') path.smooth").count() == 2
    images = page.locator(".sample img")
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
    assert tip["y"] + tip["height"] == pytest.approx(frame["y"] + 6, abs=2), "above the plot"
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip:visible div").first.inner_text().startswith("step ")

    page.locator("#run-0").click()
    assert page.locator(".chart:has-text('train/loss') path.smooth").count() == 1
    assert messages == []


@pytest.mark.slow
def test_html_in_a_name_is_escaped(browser, tmp_path):
    folder = write_run(tmp_path / "<b>x</b><script>alert(1)<", curve([1, 2]))
    out = tmp_path / "page.html"
    write_page(read_runs([folder]), out)
    page, messages = open_page(browser, out)
    assert messages == []
    assert page.locator("h1").inner_text() == folder.name


@pytest.mark.slow
def test_a_run_without_steps_is_marked(browser, tmp_path):
    write_run(tmp_path / "started", [], config="}{")
    write_run(tmp_path / "cut", [*curve([5, 10]), '{"step": 15, "train/lo'])
    out = tmp_path / "page.html"
    write_page(read_runs([tmp_path / "started", tmp_path / "cut"]), out)
    page, messages = open_page(browser, out)
    assert messages == []
    assert page.locator(".run").first.locator(".note").inner_text() == "No steps yet."
    assert page.locator("footer li").all_inner_texts() == [
        "started: config.yaml is missing or invalid",
        "started: metrics.jsonl has no metrics yet",
        "cut: metrics.jsonl: 1 invalid lines are left out",
    ]


def test_the_later_value_of_a_step_wins_and_nan_is_left_out(tmp_path):
    lines = [
        *curve([1, 2]),
        {"step": 2, "train/loss": 5.0},
        {"step": 3, "train/loss": float("nan")},
    ]
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.metrics["train/loss"] == {1: 2.0, 2: 5.0}
    assert run.last_step == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "give the --results-dir of `rae-xla train`"),
        (lambda folder: write_run(folder / "inner", []), "inner"),
    ],
)
def test_a_folder_that_is_not_a_results_folder_is_rejected(make, message, tmp_path):
    make(tmp_path / "results")
    with pytest.raises(UserError, match=message):
        read_runs([tmp_path / "results"])


def test_runs_of_the_same_name_get_longer_names_and_duplicates_are_dropped(tmp_path):
    folders = [write_run(tmp_path / name / "run", curve([1])) for name in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_long_curves_are_averaged_and_images_are_limited(tmp_path):
    steps, values = thin({step: float(step % 2) for step in range(1, 1001)}, max_points=100)
    assert len(steps) == len(values) == 100
    assert steps[-1] == 1000
    assert values == [0.5] * 100
    run = read_run(write_run(tmp_path / "run", curve([1]), range(0, 100)))
    shown = [image.step for image in select_evenly(run.images)]
    assert len(shown) == MAX_IMAGES
    assert (shown[0], shown[-1]) == (0, 99)
    page = render([run])
    assert page.count("data:image/png;base64") == MAX_IMAGES
    assert "24 of 100 sample images are shown" in page


def test_an_invalid_image_is_left_out_with_a_warning(tmp_path):
    folder = write_run(tmp_path / "run", curve([1]), [0])
    (folder / "samples/stage2-00000007.png").write_bytes(b"not an image")
    assert "stage2-00000007.png is not a readable image" in render([read_run(folder)])


def test_no_partial_page_is_left_after_a_failed_write(tmp_path):
    runs = [read_run(write_run(tmp_path / "run", curve([1])))]
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError, match=r"page\.html"):
        write_page(runs, tmp_path / "page.html")
    assert list(tmp_path.glob("*.unfinished")) == []


def test_epochs_to_reach_an_fid(tmp_path):
    fids = {100: 12.0, 200: 4.0, 300: 5.5, 400: 1.9}
    lines = [{"step": step, "eval/fid": fid, "eval/fid_lite": 0.1} for step, fid in fids.items()]
    run = read_run(write_run(tmp_path / "a", lines))
    assert epochs_to_fid(run) == {}  # the length of an epoch is not known
    run.starts.append({"plan": {"steps_per_epoch": 40}})
    assert epochs_to_fid(run) == {
        "EP_FID@2": 10.0, "EP_FID@3": 10.0, "EP_FID@5": 5.0, "EP_FID@10": 5.0, "EP_FID@20": 2.5,
        "EP_FID@50": 2.5,
    }  # fmt: skip
    assert page_data([run])["runs"][0]["epochs_to_fid"]["EP_FID@2"] == 10.0

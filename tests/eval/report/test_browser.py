"""The page in a real browser, light and dark, on a desk and on a phone: all is there, legible, and nothing is asked of anybody.

Needs playwright and a Chromium that is installed (or named by DOWNCYCLE_BROWSER). Skipped without them, but where CI is set.
"""

import importlib.util
import os
import shutil

import pytest

pytest.importorskip("matplotlib")
from downcycle.eval.report.page import PICTURES, write_report  # noqa: E402

CHROMIUM = os.environ.get("DOWNCYCLE_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LACKING = [name for name, found in {"playwright": importlib.util.find_spec("playwright"), "Chromium": CHROMIUM}.items() if not found]
HEADINGS = ["Summary", "Layers", "Benchmarks", "Perplexity", "Healing", "Size and speed", "How it was measured"]
SCHEMES, WIDTHS = ("light", "dark"), (1200, 390)

# Of each text that is shown: what it says, its colour and what lies behind it, up to the first opaque background.
COLOURS = """() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
    if (!text || element.closest('title') || element.getClientRects().length === 0) continue;
    let behind = element, alpha = 1;
    for (let e = element; e && e !== document.body; e = e.parentElement) alpha *= parseFloat(getComputedStyle(e).opacity);
    while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const svg = element.closest('svg'), style = getComputedStyle(element);
    found.push({text, svg: !!svg, size: parseFloat(style.fontSize), alpha, front: svg ? style.fill : style.color,
                back: getComputedStyle(behind || document.body).backgroundColor});
  }
  return found;
}"""
SIZES = """() => [...document.querySelectorAll('figure')].map(figure => [figure.id, [...figure.querySelectorAll('svg')]
  .map(svg => svg.getBoundingClientRect()).filter(box => box.width > 0 && box.height > 0).map(box => [box.left, box.right, box.height])])"""


@pytest.fixture(scope="module")
def browser():
    if LACKING and "CI" not in os.environ:
        pytest.skip(f"no {' and no '.join(LACKING)}")
    assert not LACKING, f"CI needs {' and '.join(LACKING)}"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    base = tmp_path_factory.mktemp("reports")
    return {name: write_report(getattr(made, name)(), base / name)[0] for name in ("llama", "many")}


class Visit:
    """A page that was opened, and all that it asked for and complained of."""

    def __init__(self, browser, path, scheme, width):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests, self.faults = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.faults.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type in ("error", "warning") else None)
        self.page.goto(path.as_uri(), wait_until="load")


@pytest.fixture(params=[(name, scheme, width) for name in ("llama", "many") for scheme in SCHEMES for width in WIDTHS], ids=str)
def visit(request, browser, reports):
    name, scheme, width = request.param
    opened = Visit(browser, reports[name], scheme, width)
    opened.scheme, opened.width, opened.url = scheme, width, reports[name].as_uri()
    yield opened
    opened.page.close()


def luminance(colour):
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def blend(front, back, alpha):
    pairs = [[float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]] for colour in (front, back)]
    return f"rgb({', '.join(str(a * alpha + b * (1 - alpha)) for a, b in zip(*pairs, strict=True))})"


def contrast(front, back):
    dark, light = sorted((luminance(front), luminance(back)))
    return (light + 0.05) / (dark + 0.05)


def test_everything_is_there_and_can_be_read(visit):
    page = visit.page
    assert visit.faults == []
    assert [url for url in visit.requests if not url.startswith("data:,")] == [visit.url]
    for heading in HEADINGS:
        assert page.get_by_role("heading", name=heading, exact=True).is_visible(), heading
    shown = dict(page.evaluate(SIZES))
    assert list(shown) == [f"figure-{name}" for name in PICTURES]
    for name, boxes in shown.items():
        assert len(boxes) == 1, name  # the wide one or the narrow one
        left, right, height = boxes[0]
        assert left >= 0 and right <= visit.width and right - left > 300 and height > 60, name
    assert page.evaluate("document.documentElement.scrollWidth") <= visit.width
    texts = page.evaluate(COLOURS)
    body = [text for text in texts if not text["svg"]]
    assert len(body) > 50 and min(text["size"] for text in body) >= 11.5
    for text in body:
        assert contrast(text["front"], text["back"]) >= 4.5, text
    drawn = [text for text in texts if text["svg"] and text["front"] not in ("rgb(255, 255, 255)", "rgb(11, 11, 11)")]
    assert len(drawn) > 50  # beside the numbers on coloured layers
    for text in drawn:
        assert contrast(blend(text["front"], text["back"], text["alpha"]), text["back"]) >= 4.5, text
    assert (luminance(body[0]["back"]) < 0.1) == (visit.scheme == "dark")


@pytest.mark.parametrize("name", ["llama", "many"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_words_of_a_figure_leave_it(browser, reports, name, width):
    page = Visit(browser, reports[name], "light", width).page
    outside = page.evaluate("""() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
      const box = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(text => {
        const one = text.getBoundingClientRect();
        return one.width > 0 && (one.left < box.left - 1 || one.right > box.right + 1 || one.top < box.top - 1 || one.bottom > box.bottom);
      }).map(text => text.textContent);
    })""")
    page.close()
    assert outside == []


def test_it_prints(browser, reports):
    page = Visit(browser, reports["llama"], "dark", 1200).page
    page.emulate_media(media="print", color_scheme="dark")
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    assert len(page.pdf()) > 20_000
    page.close()


def test_names_that_are_scripts_run_nothing(made, browser, tmp_path):
    import dataclasses

    results = made.llama()
    evil = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    models = tuple(dataclasses.replace(model, name=f"{evil}{i}") for i, model in enumerate(results.models))
    visit = Visit(browser, write_report(dataclasses.replace(results, models=models), tmp_path)[0], "light", 1200)
    assert visit.page.title() != "run" and visit.page.locator("img, script").count() == 0
    assert visit.faults == []
    visit.page.close()

"""Pages in a real browser, light and dark, on a desk and on a phone: what they ask for, what they complain of, what can be read.

Needs playwright and a Chromium that is installed (or named by DOWNCYCLE_BROWSER). Skipped without them, but where CI is set.
"""

import importlib.util
import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = os.environ.get("DOWNCYCLE_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LACKING = [name for name, found in {"playwright": importlib.util.find_spec("playwright"), "Chromium": CHROMIUM}.items() if not found]
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
OUTSIDE = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
      const box = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(text => {
        const one = text.getBoundingClientRect();
        return one.width > 0 && (one.left < box.left - 1 || one.right > box.right + 1 || one.top < box.top - 1 || one.bottom > box.bottom);
      }).map(text => text.textContent);
    })"""


@contextmanager
def open_browser():
    if LACKING and "CI" not in os.environ:
        pytest.skip(f"no {' and no '.join(LACKING)}")
    assert not LACKING, f"CI needs {' and '.join(LACKING)}"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


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

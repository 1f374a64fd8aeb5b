"""The page of scores in a real browser, light and dark, on a desk and on a phone: all is there, legible, nothing is asked of anybody."""

import pytest

from browsing import COLOURS, OUTSIDE, SCHEMES, SIZES, WIDTHS, Visit, blend, contrast, luminance, open_browser
from synthetic_scores import make_scores

pytest.importorskip("matplotlib")
from downcycle.eval.report.drawing import PALETTE  # noqa: E402
from downcycle.eval.report.scores_page import write_scores_report  # noqa: E402

ON_BLUE = "rgb(255, 255, 255)"  # numbers of kept layers
HEADINGS = ["At a glance", "What each rule keeps and loses", "Commands", "Importance of each layer", "Work", "How it was measured"]
PIXELS = "() => [...document.querySelectorAll('svg image')].filter(image => image.getBoundingClientRect().width > 0).length"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    base = tmp_path_factory.mktemp("scores")
    return {layers: write_scores_report(make_scores(layers), base / str(layers)) for layers in (4, 32, 126)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layers", [4, 32, 126])
def test_everything_is_there_and_can_be_read(browser, reports, layers, scheme, width):
    visit = Visit(browser, reports[layers], scheme, width)
    page = visit.page
    assert visit.faults == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [reports[layers].as_uri()]
    for heading in HEADINGS:
        assert page.get_by_role("heading", name=heading, exact=True).is_visible(), heading
    ((name, boxes),) = page.evaluate(SIZES)
    assert name == "figure-scores" and len(boxes) == 1  # the wide one or the narrow one
    left, right, height = boxes[0]
    assert left >= 0 and right <= width and right - left > 300 and height > 500
    assert page.evaluate(PIXELS) == 2  # the triangle and its key
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    texts = page.evaluate(COLOURS)
    body = [text for text in texts if not text["svg"]]
    assert len(body) > 50 and min(text["size"] for text in body) >= 11.5
    drawn = [text for text in texts if text["svg"] and text["front"] != ON_BLUE]
    assert len(drawn) > 50
    for text in body + drawn:
        assert contrast(blend(text["front"], text["back"], text["alpha"]), text["back"]) >= 4.5, text
    blue = f"rgb({', '.join(str(int(PALETTE[0][i : i + 2], 16)) for i in (1, 3, 5))})"
    assert contrast(ON_BLUE, blue) >= 4.5
    assert (luminance(body[0]["back"]) < 0.1) == (scheme == "dark")
    page.close()


def test_names_that_are_scripts_run_nothing(browser, tmp_path):
    evil = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    visit = Visit(browser, write_scores_report(make_scores(4, model=evil, machine=evil, refused={evil: evil}), tmp_path), "light", 1200)
    assert visit.page.title() != "run" and visit.page.locator("img, script").count() == 0
    assert visit.faults == []
    visit.page.close()

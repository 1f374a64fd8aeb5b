"""The page in a real browser, light and dark, on a desk and on a phone: all is there, legible, and nothing is asked of anybody."""

import pytest

pytest.importorskip("matplotlib")
from downcycle.eval.report.page import PICTURES, write_report  # noqa: E402

from browsing import COLOURS, OUTSIDE, SCHEMES, SIZES, WIDTHS, Visit, blend, contrast, luminance, open_browser  # noqa: E402

HEADINGS = ["Summary", "Layers", "Benchmarks", "Perplexity", "Healing", "Size and speed", "How it was measured"]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    base = tmp_path_factory.mktemp("reports")
    return {name: write_report(getattr(made, name)(), base / name)[0] for name in ("llama", "many")}


@pytest.fixture(params=[(name, scheme, width) for name in ("llama", "many") for scheme in SCHEMES for width in WIDTHS], ids=str)
def visit(request, browser, reports):
    name, scheme, width = request.param
    opened = Visit(browser, reports[name], scheme, width)
    opened.scheme, opened.width, opened.url = scheme, width, reports[name].as_uri()
    yield opened
    opened.page.close()


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
    outside = page.evaluate(OUTSIDE)
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

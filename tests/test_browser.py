"""HTML pages in a browser: they open from a disk, ask nobody, say nothing, and work."""

import re
from pathlib import Path
from typing import Any

import pytest
from browser import BOXES, DRAWN, Browser, find_chromium
from run_folders import HOSTILE, WRITERS, write_compare
from selenium.webdriver.common.keys import Keys

import steerlens as sl
from steerlens.runs.contents import COMMANDS
from steerlens.runs.html_report.figures import figures_of


def assert_quiet(browser: Browser) -> None:
    """Nothing on the console, and nothing asked for that does not lie on the disk."""
    assert browser.messages() == []
    assert browser.requests() == []


def written(path: Path, *folders: Path) -> Path:
    path.write_text(sl.report([sl.read_run(folder) for folder in folders]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of every command."""
    root = tmp_path_factory.mktemp("report")
    return written(root / "all.html", *(WRITERS[c](root / c) for c in COMMANDS))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of methods whose names would run scripts and load pictures."""
    root = tmp_path_factory.mktemp("hostile")
    return written(root / "hostile.html", write_compare(root / "run", names=[HOSTILE, "pca"]))


def opened(browser: Browser, page: Path, **options: Any) -> Browser:
    """The browser with the page open and its figures drawn."""
    browser.open(page, **options)
    browser.wait(DRAWN)
    return browser


# The checks can fail


def test_the_check_sees_requests_and_messages(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    body = '<img src="http://127.0.0.1:9/x.png"><script>console.warn("told")</script>'
    page.write_text(f"<!doctype html><title>loud</title>{body}")
    browser.open(page)
    browser.wait("document.images[0].complete")
    assert browser.requests() == ["http://127.0.0.1:9/x.png"]
    assert [message for message in browser.messages() if "told" in message]


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        find_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        find_chromium()


# Single figures


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_figure_opens_without_a_word(
    command: str, browser: Browser, tmp_path: Path
) -> None:
    figures = figures_of(sl.read_run(WRITERS[command](tmp_path / "run")))
    assert figures or command == "recommend"
    for number, figure in enumerate(figures):
        page = tmp_path / f"{number}.html"
        figure.save(page)
        opened(browser, page, width=400)
        assert browser.run(BOXES) == []
        assert_quiet(browser)


PAGES = ("attention", "tokens", "components", "graph")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_the_pages_of_circuits_open_without_a_word(
    name: str, dark: bool, browser: Browser, circuits_folder: Path
) -> None:
    opened(browser, circuits_folder / f"{name}.html", dark=dark, width=400)
    assert browser.run("return document.querySelectorAll('.figure').length") > 0
    assert browser.run("return document.documentElement.scrollWidth") <= 400
    assert_quiet(browser)


def test_a_report_of_circuits_has_their_views(
    browser: Browser, circuits_folder: Path, tmp_path: Path
) -> None:
    opened(browser, written(tmp_path / "report.html", circuits_folder))
    assert browser.run("return document.querySelectorAll('.view').length") > 2
    assert "Attention of the top heads" in browser.text("main")
    assert "The largest edges" in browser.text("main")
    assert_quiet(browser)


# The report


@pytest.mark.parametrize("width", [400, 900, 1400])
def test_the_report_opens_without_a_word_and_nothing_overlaps(
    width: int, browser: Browser, report: Path
) -> None:
    for dark in (False, True):
        opened(browser, report, dark=dark, width=width)
        assert browser.run(BOXES) == []
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert_quiet(browser)
    for kind, least in (("vega", 8), ("circuitsvis", 12)):
        n_given = browser.run(f"return document.querySelectorAll('.{kind}-data').length")
        assert n_given > least
    assert browser.run("return document.querySelectorAll('.view svg, .view canvas').length") > 1
    for selector in (".scroll", ".texts") if width == 400 else ():
        elements = f"[...document.querySelectorAll('{selector}')]"
        assert browser.run(f"return Math.max(...{elements}.map(e => e.scrollWidth))") > width
    # The check sees what lies on something else, and what is too wide.
    browser.run("document.querySelector('figure figcaption').style.marginTop = '-5rem'")
    assert len(browser.run(BOXES)) == 1
    browser.run("document.querySelector('svg.marks').style.minWidth = '3000px'")
    assert [told for told in browser.run(BOXES) if told.startswith("scrolls: ")]


def test_samples_are_chosen(browser: Browser, report: Path) -> None:
    """One at a time of every prompt and coefficient; all of them without scripts."""
    opened(browser, report)
    shown = (
        "return [...document.querySelectorAll('#run6 [data-sample]')]"
        ".filter(e => e.checkVisibility({contentVisibilityAuto: true})).map(e => e.dataset.sample)"
    )
    browser.run("for (const e of document.querySelectorAll('#run6 details')) e.open = true")
    assert browser.run(shown) == ["1"] * 8
    choose = "const list = document.querySelector('#run6 .sample select'); list.value = given[0];"
    choose += "list.dispatchEvent(new Event('change'))"
    browser.run(choose.replace("given[0]", "'2'"))
    assert browser.run(shown) == ["2"] * 8
    browser.run(choose.replace("given[0]", "'all'"))
    assert browser.run(shown) == ["1", "2"] * 8
    assert_quiet(browser)


def test_a_layer_is_picked_everywhere_and_columns_are_chosen(
    browser: Browser, report: Path
) -> None:
    opened(browser, report, width=1400)
    browser.run("document.querySelector('#run1-table-layers tr[data-layer=\"15\"]').click()")
    selects = "[...document.querySelectorAll('#run1 .vega-bind select')]"
    browser.wait(f"{selects}.every((e) => e.value === '15')")
    assert len(browser.run(f"return {selects}.map((e) => e.value)")) == 3
    assert browser.text("#run1 .frames output") == "15"
    picked = "return document.querySelectorAll('#run1 tr.picked').length"
    n_picked = browser.run(picked)
    browser.run(
        f"const list = {selects}[0]; list.selectedIndex = 3;list.dispatchEvent(new Event('change'))"
    )
    browser.wait(f"{selects}.every((e) => e.value === '2')")
    assert browser.run(picked) == n_picked > 2
    table = "const table = document.querySelector('#run1-table-sweep');"
    heads = f"{table} return [...table.querySelectorAll('th')].filter((e) => !e.hidden).length"
    n_shown = browser.run(heads)
    browser.run(f"{table} table.querySelector('.tools input:not(:checked)').click()")
    assert browser.run(heads) == n_shown + 1
    files = browser.run(
        f"{table} const made = []; const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { made.push(blob); return make(blob); };"
        "for (const button of table.querySelectorAll('.tools button')) button.click();"
        "URL.createObjectURL = make; return Promise.all(made.map((blob) => blob.text()))"
    )
    head, first, *_ = files[0].splitlines()
    assert head.startswith("layer,coefficient,asked,projection,projection_ci_low,")
    assert first.startswith("0,-40,")
    assert ",-100,-102,-98," in first
    assert len(files[0].splitlines()) == 211
    assert files[1].startswith("\\begin{tabular}{rr")
    assert "0 & $-$40 & -40 & $-$100" in files[1]
    assert_quiet(browser)


LIGHTNESS = """
const image = new Image();
image.src = "data:image/png;base64," + given[0];
await image.decode();
const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
canvas.drawImage(image, 0, 0);
const {data} = canvas.getImageData(0, 0, image.width, image.height), counts = Array(256).fill(0);
for (let i = 0; i < data.length; i += 4)
  counts[Math.round((data[i] + data[i + 1] + data[i + 2]) / 3)]++;
const seen = counts.flatMap((count, value) => count ? [value] : []);
return [counts.indexOf(Math.max(...counts)), seen[0], seen.at(-1)]"""
"""Of a picture's pixels, 0 to 255: the commonest, the darkest, the lightest."""


def lightness(browser: Browser) -> tuple[int, int, int]:
    """Of the first chart as it is seen: its ground, the darkest and the lightest of it."""
    chart = browser.driver.find_element("css selector", "svg.marks")
    browser.run("document.querySelector('svg.marks').scrollIntoView()")
    ground, darkest, lightest = browser.run(LIGHTNESS, chart.screenshot_as_base64)
    return ground, darkest, lightest


def page_ground(browser: Browser) -> list[float]:
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    return [float(x) for x in re.findall(r"[\d.]+", colour)[:3]]


def show(browser: Browser, scheme: str, media: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    emulated = {"media": media, "features": features}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)


def test_pages_and_curves_follow_the_scheme_and_the_printer(browser: Browser, report: Path) -> None:
    """A dark curve is lighter on a dark page, and itself again on a light one and on paper."""
    opened(browser, report, dark=False, width=1200)
    assert min(page_ground(browser)) > 240
    light = lightness(browser)
    assert light[0] > 240
    assert light[1] < 60
    tallest = (
        "return Math.max(...[...document.querySelectorAll('.scroll')].map(e => e.clientHeight))"
    )
    assert browser.run(tallest) < 2000
    show(browser, "dark")
    assert max(page_ground(browser)) < 40
    ground, darkest, lightest = lightness(browser)
    assert darkest >= ground - 8  # no curve is darker than the page
    assert ground < 40
    assert lightest > 200
    show(browser, "dark", media="print")
    assert min(page_ground(browser)) > 240
    assert lightness(browser) == light
    assert browser.run(tallest) > 2000  # on paper all rows are there
    # What is wider than the paper is drawn smaller.
    wide = "return [...document.querySelectorAll('svg.marks')].map(e => e.clientWidth)"
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PAPER)
    assert max(browser.run(wide)) <= PAPER["width"]
    show(browser, "light")
    assert max(browser.run(wide)) > PAPER["width"]


PAPER = {"width": 680, "height": 900, "deviceScaleFactor": 1, "mobile": False}


CELLS = (
    "const rows = document.querySelectorAll('#run1-table-layers tbody tr');"
    "return [...rows].map((row) => row.cells[1].dataset.v)"
)


def layers_head(browser: Browser, column: int) -> Any:
    """The sort button of a column of the per-layer table, and the state of its heading."""
    script = (
        f"const head = document.querySelectorAll('#run1-table-layers th')[{column}];"
        "return [head.querySelector('button'), head.getAttribute('aria-sort')]"
    )
    return browser.driver.execute_script(script)


def test_a_table_sorts_by_clicks_and_keys_and_keeps_one_order(
    browser: Browser, report: Path
) -> None:
    """The column of the separation, 1 to 30: down, up, and back to the order of the file."""
    opened(browser, report)
    before = browser.run(CELLS)
    assert [float(text) for text in before] == [1.0 + layer for layer in range(30)]
    orders = {"none": before, "descending": before[::-1], "ascending": before}
    assert layers_head(browser, 1)[1] == "none"
    for state in ("descending", "ascending", "none"):
        layers_head(browser, 1)[0].click()
        assert (layers_head(browser, 1)[1], browser.run(CELLS)) == (state, orders[state])
    layers_head(browser, 0)[0].click()
    layers_head(browser, 1)[0].send_keys(Keys.ENTER)
    assert browser.run(CELLS) == before[::-1]
    assert [layers_head(browser, i)[1] for i in (0, 1)] == ["none", "descending"]
    layers_head(browser, 1)[0].send_keys(Keys.SPACE)
    assert browser.run(CELLS) == before


def test_cells_without_a_number_come_last(browser: Browser, report: Path) -> None:
    """Of the readers' exact effects one is missing; of the boundaries one is infinite."""
    opened(browser, report)
    for table, name, key, last in (
        ("run4-table-readers", "exact", "ascending", ""),
        ("run4-table-readers", "exact", "descending", ""),
        ("run2-table-layers", "boundary pos", "ascending", "beyond 56 (6 to beyond 56)"),
    ):
        found = browser.run(
            f"const table = document.querySelector('#{table} table');"
            f"const heads = [...table.querySelectorAll('th')];"
            f"const column = heads.findIndex((h) => h.innerText.startsWith('{name}'));"
            f"while (heads[column].getAttribute('aria-sort') !== '{key}')"
            "  heads[column].querySelector('button').click();"
            "return [...table.tBodies[0].rows].map((row) => row.cells[column].innerText)"
        )
        assert found[-1] == last
        assert len(found) > 1


def test_a_slider_moves_a_figure(browser: Browser, report: Path) -> None:
    """One frame a layer: at the right end it shows the last layer's points, by keyboard."""
    opened(browser, report)
    chart = "document.querySelector('.frames').closest('figure').querySelector('svg.marks')"
    shown = f"{chart}.innerHTML"
    # It starts at the layer that is pushed furthest.
    assert browser.text(".frames output") == "12"
    slider = browser.driver.execute_script("return document.querySelector('.frames input')")
    browser.run(f"window.first = {shown}")
    slider.send_keys(Keys.HOME)
    browser.wait(f"{shown} !== window.first")
    first = browser.run(f"return window.first = {shown}")
    slider.send_keys(Keys.END)
    assert browser.text(".frames output") == "29"
    assert slider.get_attribute("aria-valuetext") == "29"
    browser.wait(f"{shown} !== window.first")
    slider.send_keys(Keys.HOME)
    browser.wait(f"{shown}.length === {len(first)}")
    assert_quiet(browser)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(
    browser: Browser, report: Path
) -> None:
    opened(browser, report)
    page = browser.driver.switch_to.active_element
    page.send_keys(Keys.TAB)
    focused = "const at = document.activeElement; return [at.className, getComputedStyle(at).{}]"
    assert browser.run(focused.format("outlineStyle")) == ["skip", "solid"]
    assert browser.run(focused.format("left"))[1] != "-15984px"
    seen = set()
    for _ in range(120):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        kind, style = browser.run(
            "const at = document.activeElement;"
            "return [at.className || at.tagName, getComputedStyle(at).outlineStyle]"
        )
        seen.add(kind)
        assert style != "none" or kind == "INPUT"
    assert {"A", "SUMMARY", "INPUT", "scroll-x", "scroll", "texts", "BUTTON"} <= seen


def test_without_scripts_tables_and_texts_are_there(browser: Browser, report: Path) -> None:
    browser.open(report, scripts=False)
    body = browser.driver.find_element("tag name", "body").text
    assert "scripts are off here" in body
    assert "beyond 56" in body
    # Without a script to ask for the others, all columns are shown.
    assert browser.driver.find_element("css selector", "th[hidden]").is_displayed()
    assert not browser.driver.find_elements("css selector", "th button")
    assert not browser.driver.find_elements("css selector", "svg.marks")
    assert_quiet(browser)


def test_a_browser_that_cannot_inflate_says_so(browser: Browser, report: Path) -> None:
    add, remove = (f"Page.{which}ScriptToEvaluateOnNewDocument" for which in ("add", "remove"))
    cdp = browser.driver.execute_cdp_cmd
    added = cdp(add, {"source": "delete globalThis.DecompressionStream"})
    try:
        browser.open(report)
        browser.wait("document.querySelector('.figure').innerText.includes('cannot')")
        assert "beyond 56" in browser.text("main")
        assert not browser.driver.find_elements("css selector", "svg.marks")
    finally:
        cdp(remove, {"identifier": added["identifier"]})


def hovered(browser: Browser, selector: str) -> str:
    """What is told under the pointer, mark by mark."""
    from selenium.webdriver import ActionChains

    told = []
    for mark in browser.driver.find_elements("css selector", f"svg.marks {selector}"):
        ActionChains(browser.driver).move_to_element(mark).perform()
        browser.wait("document.querySelector('.vg-tooltip.visible')")
        told.append(browser.text(".vg-tooltip"))
        corner = browser.driver.find_element("css selector", "svg.marks text")
        ActionChains(browser.driver).move_to_element(corner).perform()
        browser.wait("!document.querySelector('.vg-tooltip.visible')")
    return "\n".join(told)


def test_hostile_text_is_shown_as_it_is(browser: Browser, hostile: Path) -> None:
    opened(browser, hostile)
    labels = browser.run(
        "return [...document.querySelectorAll('svg.marks text')].map(t => t.textContent)"
    )
    # A long label is cut; under the pointer it is whole.
    assert [label for label in labels if label[-1] == "…" and HOSTILE.startswith(label[:-1])]
    assert HOSTILE in hovered(browser, ".mark-symbol.role-mark path")
    assert HOSTILE in browser.run("return document.body.innerText.replace(/\\s+/g, ' ')")
    assert browser.run("return document.querySelectorAll('img, svg a, .vg-tooltip a').length") == 0
    assert_quiet(browser)


def test_a_script_that_got_into_the_page_would_not_run(
    browser: Browser, hostile: Path, tmp_path: Path
) -> None:
    """The page's policy is a second wall: it names the scripts that may run."""
    breach = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    page = tmp_path / "breached.html"
    text = hostile.read_text(encoding="utf-8").replace("</main>", f"{breach}</main>")
    page.write_text(text, encoding="utf-8")
    opened(browser, page)
    assert browser.run("return document.title").startswith("steerlens report")
    assert len([m for m in browser.messages() if "Content Security Policy" in m]) >= 2
    page.write_text(re.sub("<meta http-equiv[^>]*>", "", text), encoding="utf-8")
    opened(browser, page)
    assert browser.run("return document.title") == "run"

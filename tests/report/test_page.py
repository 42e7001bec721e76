"""The report page, looked at by a real browser; its numbers against numpy on the PNGs."""

import base64
import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import expect

from vqdm.errors import UserError
from vqdm.report.gallery import LARGEST, WEBP_QUALITY
from vqdm.report.marks import marks_of
from vqdm.report.page import PageContent, PageMethod, write_page
from vqdm.report.plot import plot_data

SIZE = 16
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "\"quotes\" & 'more' <b>bold</b> <!-- <script>alert(2)</script>",
    "line\u2028separator\u2029 ${document.title} \\u003c",
    "]]></style></script x><script>alert(3)</script>",
)
NOISE = {"full precision": 0, "RTN 4 bit": 9, 'VQ <3> & "bit"': 30, "trellis": 4}


def pixels(method: int, row: int, noise: float) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: the row's picture, with noise of this method's own size, other from row to row."""
    picture = np.random.default_rng(row).integers(0, 256, (SIZE, SIZE, 3))
    own = np.random.default_rng([method, row])
    changed = picture + own.normal(0, noise * own.uniform(0.3, 2), picture.shape)
    return changed.clip(0, 255).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def stage(directory, images, scores: dict, copies: int = 1) -> tuple:
    """The files of a generate and an evaluate stage: images and images.csv."""
    (directory / "images").mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(directory / "images" / f"{index:06d}.png")
    with (directory / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "copy", *scores])
        for index, values in enumerate(zip(*scores.values(), strict=True)):
            writer.writerow([f"test-{index // copies:06d}", index % copies, *values])
    return directory, directory / "images.csv"


LAYERS = {
    "quantized": [
        {
            "name": f"down.{i}.conv", "shape": [8, 10 + i], "scheme": {"codec": "rtn", "bits": 4, "group_size": 64},
            "bits": 4.0 + i / 10, "relative_weight_error": 0.01, "relative_output_error": error, "seconds": 0.1,
        }
        for i, error in enumerate([0.003, 2e-5, 0.3, 0.04])
    ],
    "left_in_16_bit": [{"name": "conv_in", "shape": [8, 4], "reason": "the pattern does not select it"}],
}  # fmt: skip
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"><style>rect{fill:#f00}</style>
<rect width="90" height="60"/></svg>"""


def content(root, rows: int = 12, noise: dict = NOISE, **changes) -> PageContent:
    """A page's content with stages made under `root`; PSNR is numpy's, of the very files."""
    methods = []
    reference = [pixels(0, row, 0) for row in range(rows)]
    for number, (name, size) in enumerate(noise.items()):
        images = [pixels(number, row, size) for row in range(rows)]
        scores = {"clip_score": [0.5 + (row * 7 % rows) / 100 for row in range(rows)]}
        if size:
            scores["psnr_to_fp"] = [psnr(a, b) for a, b in zip(reference, images, strict=True)]
            scores["distance_to_fp"] = [1 / value for value in scores["psnr_to_fp"]]
        layers = root / f"layers-{number}.json"
        layers.write_text(json.dumps(LAYERS))
        directory, scored = stage(root / f"method-{number}", images, scores)
        methods.append(PageMethod(name, directory, scored, layers if size else None, f"{number} MiB"))
    prompts = [
        HOSTILE[row] if row < len(HOSTILE) else f"a {'red' if row % 2 else 'green'} cube {row}" for row in range(rows)
    ]
    (root / "figure.svg").write_text(SVG)
    plain = PageContent(
        title="Table <1> & co",
        summary="What 3 bits do.",
        table_header=("method", "bits", "PSNR"),
        table_rows=[(name, "3.00", "30.1 ± 0.2") for name in noise],
        notes=["n: 12", "a note with </ul><script>alert(4)</script>"],
        figures=[("Bits against \"PSNR\"", root / "figure.svg")],
        methods=methods,
        prompts=prompts,
        commands=["python run.py +experiment=demo", "echo '<b>' && true"],
        versions={"torch": "2.13.0"},
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    page = root / "page.html"
    write_page(page, content(root), max_mib=8)
    return page


@pytest.fixture
def page(browser_page, made):
    browser_page.goto(made.as_uri())
    choice(browser_page, "Order").select_option(label="as listed")
    return browser_page


def image_file(made, method: int, row: int) -> np.ndarray:
    path = made.parent / f"method-{method}" / "images" / f"{row:06d}.png"
    return np.asarray(Image.open(path).convert("RGB"))


def choice(page, name: str):
    return page.get_by_role("combobox", name=name, exact=True)


def said_of_zoom(page, text: str) -> str:
    """What the dialog says below the image, once `text` is in it."""
    expect(page.locator("#zoom-method")).to_contain_text(text)
    return page.locator("#zoom-method").inner_text()


def wait_for_source(image):
    """Until an image has one; what `expect` says of a gallery of thousands would be long."""
    image.and_(image.page.locator("[src^='data:']")).wait_for(state="attached")


def shown_prompts(page) -> list[str]:
    return page.locator("#grid .row:not([hidden]) .prompt").all_text_contents()


def active(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_for_nothing(made):
    text = made.read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)""", text) == []
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org)", text) == []
    assert "default-src 'none'" in text and "unsafe" not in text
    assert "innerHTML" not in text and "eval(" not in text
    assert not list(made.parent.glob("*.tmp"))


def test_the_same_content_gives_the_same_bytes(made, tmp_path):
    write_page(tmp_path / "again.html", content(tmp_path), max_mib=8)
    assert (tmp_path / "again.html").read_bytes() == made.read_bytes()


def test_small_images_are_the_files_themselves(page, made):
    image = page.locator("#grid .row").nth(1).locator("img").nth(2)
    image.scroll_into_view_if_needed()
    expect(image).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    data = base64.b64decode(image.get_attribute("src").split(",")[1])
    assert data == (made.parent / "method-2/images/000001.png").read_bytes()


def test_large_images_are_shown_smaller_and_the_page_says_so(tmp_path, browser_page):
    big = np.asarray(Image.effect_noise((1200, 900), 60).convert("RGB"))
    directory, scored = stage(tmp_path / "big", [big, big[::-1]], {"clip_score": [1, 2]})
    write_page(tmp_path / "p.html", PageContent("t", methods=[PageMethod("a", directory, scored)], prompts=["x", "y"]))
    browser_page.goto((tmp_path / "p.html").as_uri())
    about = browser_page.locator("#gallery .about").first.inner_text()
    assert (
        f"1200 × 900 and are shown at 512 × 384 pixels (at most {LARGEST}) as WebP of quality {WEBP_QUALITY}" in about
    )
    image = browser_page.locator("#grid img").first
    expect(image).to_have_attribute("src", re.compile("^data:image/webp"))
    assert image.evaluate("i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])") == [512, 384]


def test_the_budget_keeps_the_first_and_the_worst(tmp_path, browser_page):
    rows = 200
    made = content(tmp_path, rows=rows)
    write_page(tmp_path / "p.html", made, max_mib=0.2)
    size = (tmp_path / "p.html").stat().st_size
    assert 0.17 * 2**20 < size <= 0.2 * 2**20
    browser_page.goto((tmp_path / "p.html").as_uri())
    kept = browser_page.evaluate("JSON.parse(document.getElementById('rows').textContent).map(row => row.prompt)")
    about = browser_page.locator("#gallery .about").first.inner_text()
    assert f"Showing {len(kept)} of 200 prompts" in about and "worst psnr_to_fp" in about
    worst = [
        min(psnr(image_file(tmp_path / "p.html", 0, r), image_file(tmp_path / "p.html", m, r)) for m in (1, 2, 3))
        for r in range(rows)
    ]
    count = len(kept) // 2
    assert 4 < count < rows / 2
    assert set(range(count)) <= set(kept) and set(np.argsort(worst)[:count].tolist()) <= set(kept)
    assert len(set(kept)) == len(kept) and kept == sorted(kept)


def test_a_page_without_room_for_one_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="larger max_mib"):
        write_page(tmp_path / "p.html", content(tmp_path), max_mib=0.01)
    assert not (tmp_path / "p.html").exists()


def test_scores_of_different_prompts_are_refused(tmp_path):
    made = content(tmp_path)
    scored = made.methods[1].scores
    scored.write_text(scored.read_text().replace("test-000003", "test-000033"))
    with pytest.raises(UserError, match="different prompts"):
        write_page(tmp_path / "p.html", made)


def test_a_file_that_is_no_list_of_layers_is_named(tmp_path):
    made = content(tmp_path)
    made.methods[1].layers.write_text('{"quantized": [{"name": "a"}], "left_in_16_bit": []}')
    with pytest.raises(UserError, match=r"layers-1\.json is no list of layers"):
        write_page(tmp_path / "p.html", made)


def test_what_makes_pages_imports_no_torch():
    code = "import sys, vqdm.report.page; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# ---- in the browser -------------------------------------------------------------------------------------------------


def test_text_from_outside_never_becomes_markup(page):
    assert shown_prompts(page)[:4] == list(HOSTILE)
    assert page.locator("img[src=x], #gallery b, #results script, .notes script").count() == 0
    assert page.title() == "Table <1> & co" and page.locator("h1").inner_text() == "Table <1> & co"
    assert page.locator("tbody th").nth(2).inner_text() == 'VQ <3> & "bit"'
    assert "</ul><script>alert(4)</script>" in page.locator(".notes").text_content()
    assert "echo '<b>' && true" in page.locator("pre").inner_text()
    page.locator("#grid button").nth(2).click()
    assert page.locator("#zoom-prompt").inner_text() == HOSTILE[0]
    assert 'VQ <3> & "bit"' in page.locator("#zoom-method").inner_text()
    assert page.locator("#right").get_attribute("alt") == f'VQ <3> & "bit": {HOSTILE[0]}'


def test_the_policy_stops_what_would_get_in(browser_page, made, tmp_path):
    from browser import watch

    forged = made.read_text().replace(
        "<h1>", "<h1><img src=x onerror=\"document.title='got in'\"><script>document.title='got in'</script>"
    )
    (tmp_path / "forged.html").write_text(forged)
    other = browser_page.context.new_page()
    problems = watch(other)
    other.goto((tmp_path / "forged.html").as_uri())
    other.wait_for_selector("#grid .row")
    assert other.title() == "Table <1> & co"
    assert sum("Content Security Policy" in problem for problem in problems) >= 2
    assert browser_page.evaluate("window.trustedTypes ? 1 : 0") == 1


def test_figures_are_drawn(page):
    figure = page.locator("figure img")
    assert figure.get_attribute("alt") == 'Bits against "PSNR"'
    drawn = """image => image.decode().then(() => {
        const context = new OffscreenCanvas(90, 60).getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(45, 30, 1, 1).data];
    })"""
    assert figure.evaluate(drawn) == [255, 0, 0, 255], (
        "the style inside the SVG holds, the page's policy notwithstanding"
    )


def test_the_filter_wants_all_words(page):
    page.get_by_label("Prompts with").fill("CUBE red")
    assert shown_prompts(page) == [f"a red cube {row}" for row in (5, 7, 9, 11)]
    assert page.locator("#count").inner_text() == "4 of 12 shown"
    page.get_by_label("Prompts with").fill("</SCRIPT>")
    assert page.locator("#count").inner_text() == "3 of 12 shown"
    page.get_by_label("Prompts with").fill("nothing like it")
    assert page.locator("#none").is_visible()
    page.get_by_label("Prompts with").fill("")
    assert len(shown_prompts(page)) == 12


def test_the_worst_come_first_as_numpy_orders_them(page, made):
    original = [image_file(made, 0, row) for row in range(12)]
    scores = np.array([[psnr(original[row], image_file(made, m, row)) for row in range(12)] for m in (1, 2, 3)])
    prompts = shown_prompts(page)
    page.reload()
    assert choice(page, "Score").input_value() == "1", "PSNR is what is shown first"
    assert choice(page, "Order").input_value() == "-1", "and the worst of any method"
    assert shown_prompts(page) == [prompts[row] for row in np.argsort(scores.min(0))]
    choice(page, "Order").select_option(label="worst of trellis first")
    by_trellis = [prompts[row] for row in np.argsort(scores[2])]
    assert shown_prompts(page) == by_trellis
    below = page.locator("#grid .row").first.locator(".score").all_text_contents()
    assert below[0] == "–" and float(below[3]) == pytest.approx(scores[2].min(), rel=1e-3)
    choice(page, "Score").select_option(label="distance_to_fp")  # lower is better: the same order
    assert shown_prompts(page) == by_trellis
    choice(page, "Score").select_option(label="clip_score")
    assert shown_prompts(page)[0] == prompts[0]
    choice(page, "Order").select_option(label="as listed")
    assert shown_prompts(page) == prompts


def difference(page) -> np.ndarray:
    """What the canvas shows, uint8 RGB."""
    said_of_zoom(page, "mean difference")
    values = page.evaluate(
        """() => { const c = document.getElementById("difference");
        return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
    )
    return np.array(values, np.uint8).reshape(SIZE, SIZE, 4)[..., :3]


@pytest.mark.parametrize("gain", [1, 8, 32])
def test_the_difference_map_is_numpys(page, made, gain):
    page.locator("#grid .row").nth(5).locator("button").nth(2).click()
    page.get_by_text("Difference", exact=True).click()
    choice(page, "Gain").select_option(str(gain))
    expect(page.locator("#difference")).to_have_attribute("aria-label", re.compile(f"times {gain}:"))
    a, b = image_file(made, 0, 5).astype(int), image_file(made, 2, 5).astype(int)
    assert np.array_equal(difference(page), np.minimum(gain * abs(a - b), 255))
    said = page.locator("#zoom-method").inner_text()
    assert f"mean difference {abs(a - b).mean():.2f}, largest {abs(a - b).max()} of 255" in said
    assert f"PSNR {psnr(a, b):.2f} dB" in said
    choice(page, "Left").select_option('VQ <3> & "bit"')
    said_of_zoom(page, "PSNR ∞")
    assert difference(page).max() == 0


def test_the_slider_divides_two_images(page, made):
    page.locator("#grid .row").nth(4).locator("button").nth(2).click()
    page.get_by_text("Slider", exact=True).click()
    page.get_by_label("Divider").fill("25")
    stage = page.locator("#stage")
    shot = np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("RGB")).astype(int)
    height, width, _ = shot.shape
    centres = [int((i + 0.5) * width / SIZE) for i in range(SIZE)]
    rows = [int((i + 0.5) * height / SIZE) for i in range(SIZE)]
    sampled = shot[np.ix_(rows, centres)]
    left, right = image_file(made, 0, 4), image_file(made, 2, 4)
    assert np.abs(sampled[1:-1, 1:4] - left[1:-1, 1:4]).max() <= 2
    assert np.abs(sampled[1:-1, 4:-1] - right[1:-1, 4:-1]).max() <= 2
    assert np.abs(left.astype(int) - right).max() > 20
    box = stage.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20, steps=3)
    page.mouse.up()
    assert page.get_by_label("Divider").input_value() == "80"


def test_a_walk_by_keyboard(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    choice(page, "Order").focus()
    page.keyboard.press("Tab")
    assert active(page) == "full precision, prompt 1: enlarge"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus is visible"
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "End"):
        page.keyboard.press(key)
    assert active(page) == "trellis, prompt 3: enlarge"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#zoom").is_visible() and "4 of 12" in page.locator("#zoom-place").inner_text()
    assert page.locator("#zoom-method").inner_text() == "RTN 4 bit (1 MiB)"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # there is no further one
    page.keyboard.press("ArrowDown")
    assert page.locator("#zoom-prompt").inner_text() == "a green cube 4"
    assert page.locator("#right").get_attribute("alt") == "trellis: a green cube 4"
    page.keyboard.press("3")
    said_of_zoom(page, "mean difference")
    page.keyboard.press("ArrowUp")
    assert page.locator("#zoom-prompt").inner_text().startswith("]]></style>")
    page.keyboard.press("2")
    page.get_by_label("Divider").focus()
    page.keyboard.press("ArrowRight")  # belongs to the divider here
    assert page.get_by_label("Divider").input_value() == "51"
    assert choice(page, "Right").input_value() == "3"
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    expect(page.locator("[aria-label='trellis, prompt 4: enlarge']"), "where the walk ended").to_be_focused()


def test_what_a_screen_reader_finds(page):
    for name in ("Results", "Figures", "Images", "Layers", "How it was made"):
        assert page.get_by_role("region", name=name, exact=True).count() == 1
    assert page.get_by_role("grid", name="Images").get_by_role("row").count() == 12
    assert page.get_by_role("grid").get_by_role("rowheader").count() == 12
    assert page.get_by_role("grid").get_by_role("gridcell").count() == 48
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input")].filter(e => !e.getAttribute("aria-label")
        && !e.textContent.trim() && !e.labels?.length).length"""
    )
    assert unnamed == 0
    assert page.locator("#grid [tabindex='0']").count() == 1, "the gallery is one stop of Tab"
    page.locator("#grid button").first.click()
    assert page.get_by_role("dialog", name="full precision").count() == 1
    page.keyboard.press("3")
    expect(page.get_by_role("img", name="Difference of")).to_have_count(1)


def test_layers_sort(page):
    def column(n):
        return expect(page.locator(f"#layers-table tbody tr > :nth-child({n})"))

    column(1).to_have_text([*(f"down.{i}.conv" for i in range(4)), "conv_in"])
    expect(page.locator("#layers-about")).to_have_text("4 layers quantized (368 weights), 1 left in 16 bit")
    column(7).to_have_text([*["rtn 4 bit g64"] * 4, "16 bit: the pattern does not select it"])
    head = page.get_by_role("columnheader", name="relative output error")
    head.get_by_role("button").click()
    column(4).to_have_text(["0.3", "0.04", "0.003", "0.00002", "–"])
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")  # focus stayed on the header
    column(4).to_have_text(["0.00002", "0.003", "0.04", "0.3", "–"])
    assert head.get_attribute("aria-sort") == "ascending"
    choice(page, "Method").select_option("trellis")
    column(1).to_have_count(5)


def luminance(page) -> float:
    return float(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).mean())


def test_light_and_dark_by_the_system_and_by_the_button(page):
    assert luminance(page) > 200
    page.emulate_media(color_scheme="dark")
    assert luminance(page) < 60
    page.get_by_role("button", name="Dark").click()
    assert luminance(page) > 200
    page.reload()
    assert luminance(page) > 200, "the choice is remembered, against the system"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})

    def too_wide():
        return page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth")

    assert too_wide() <= 0
    page.locator("#grid button").nth(2).click()
    for key in "123":
        page.keyboard.press(key)
        assert too_wide() <= 0
        assert page.evaluate("(d => d.scrollWidth - d.clientWidth)(document.getElementById('zoom'))") <= 0


def test_images_that_were_not_made_are_said_to_be_missing(tmp_path, browser_page):
    made = content(tmp_path, rows=3)
    (made.methods[1].images / "images" / "000002.png").unlink()
    write_page(tmp_path / "p.html", made)
    browser_page.goto((tmp_path / "p.html").as_uri())
    choice(browser_page, "Order").select_option(label="as listed")
    browser_page.locator("#grid .row").nth(2).scroll_into_view_if_needed()
    expect(browser_page.locator("#grid .row").nth(2).get_by_text("not made")).to_have_count(1)
    browser_page.locator("#grid .row").nth(2).locator("button").nth(1).click()
    assert browser_page.locator("#missing").is_visible()
    browser_page.keyboard.press("ArrowRight")
    assert not browser_page.locator("#missing").is_visible()


def test_several_images_of_a_prompt_are_rows_of_their_own(tmp_path, browser_page):
    made = content(tmp_path, rows=6)
    methods = []
    for number in range(2):
        images = [pixels(number, row, 5) for row in range(6)]
        directory, scored = stage(tmp_path / f"two-{number}", images, {"clip_score": range(6)}, copies=3)
        methods.append(PageMethod(f"m{number}", directory, scored))
    write_page(tmp_path / "p.html", replace(made, methods=methods, prompts=["first", "second"], images_per_prompt=3))
    browser_page.goto((tmp_path / "p.html").as_uri())
    choice(browser_page, "Order").select_option(label="as listed")
    assert shown_prompts(browser_page) == ["first"] * 3 + ["second"] * 3
    assert browser_page.locator(".head .hint").nth(4).text_content() == "prompt 2, image 2"
    assert choice(browser_page, "Score").inner_text() == "clip_score", "copy is no score"


def test_a_page_without_images_or_layers(tmp_path, browser_page):
    rows = [("VQDM", "not run", "3x8g8 codes"), ("RTN", "−0.02 ± 0.1", "–")]
    write_page(tmp_path / "p.html", PageContent("Plan", table_header=("a", "b", "c"), table_rows=rows))
    browser_page.goto((tmp_path / "p.html").as_uri())
    assert browser_page.locator("thead th").evaluate_all("cells => cells.map(c => c.className)") == [
        "text",
        "number",
        "text",
    ]
    assert browser_page.locator("h2").all_inner_texts() == ["Results"]
    browser_page.get_by_role("button", name="Dark").click()


def test_five_hundred_prompts_open_fast_and_are_turned_in_pages_of_fifty(tmp_path, browser_page, capsys):
    made = content(tmp_path, rows=500, noise={f"method {i}": 3 * i for i in range(8)})
    write_page(tmp_path / "p.html", made, max_mib=64)
    browser_page.goto((tmp_path / "p.html").as_uri())
    count = "[...document.querySelectorAll('#grid img')].filter(i => i.src && i.complete).length"
    assert browser_page.locator("#grid img").count() == 400
    at_load = browser_page.evaluate(count)
    ready = browser_page.evaluate("performance.getEntriesByName('ready')[0].startTime")
    parsed = browser_page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
    with capsys.disabled():
        print(f"\n500 prompts × 8 methods, {(tmp_path / 'p.html').stat().st_size / 2**20:.1f} MiB: ", end="")
        print(f"gallery ready after {ready:.0f} ms, parsed after {parsed:.0f} ms, {at_load} images decoded")
    assert at_load < 100
    choice(browser_page, "Order").select_option(label="as listed")
    pager = browser_page.get_by_role("group", name="Pages of images", exact=True)
    turn = pager.get_by_role("button", name="Next")
    assert pager.get_by_role("button", name="Previous").is_disabled()
    seen = shown_prompts(browser_page)
    for page in range(2, 11):
        turn.click()
        assert f"page {page} of 10" in pager.inner_text()
        seen += shown_prompts(browser_page)
    assert seen == list(made.prompts), "every prompt once, in order"
    assert turn.is_disabled() and browser_page.locator("#count").inner_text() == "451–500 of 500"
    wait_for_source(browser_page.locator("#grid .row").first.locator("img").last)
    browser_page.get_by_label("Prompts with").fill("red")
    assert browser_page.locator("#count").inner_text() == "1–50 of 248 of 500 shown"


def test_the_dialog_walks_across_pages_and_closes_where_it_ended(tmp_path, browser_page):
    write_page(tmp_path / "p.html", content(tmp_path, rows=60))
    browser_page.goto((tmp_path / "p.html").as_uri())
    choice(browser_page, "Order").select_option(label="as listed")
    browser_page.locator("#grid .row").nth(49).locator("button").first.click()
    browser_page.keyboard.press("ArrowDown")
    assert browser_page.locator("#zoom-prompt").inner_text() == "a green cube 50"
    browser_page.keyboard.press("Escape")
    expect(browser_page.locator("[aria-label='full precision, prompt 51: enlarge']")).to_be_focused()
    assert len(shown_prompts(browser_page)) == 10


# ---- what stands first ----------------------------------------------------------------------------------------------

DATA = pd.DataFrame(
    [
        ("full precision", 16.0, 6.9, 1.0, 0.1, None, None),
        ("RTN 4 bit", 4.8, 2.1, 1.1, 0.1, 20.0, 0.5),
        ("VQ <3> & \"bit\"", 3.8, 1.7, 1.2, 0.1, 19.0, 0.25),
        ("trellis", 3.7, 1.6, 1.3, 0.1, 25.0, 0.125),
    ],
    columns=["method", "bits_per_weight", "mib", "fid", "fid_se", "psnr_to_fp", "psnr_to_fp_se"],
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A page with marks and a plot; the RTN row is smaller than full precision and beaten by trellis."""
    root = tmp_path_factory.mktemp("first")
    header = ("method", "bits_per_weight", "mib", "fid", "psnr_to_fp")
    rows = [[str(value) for value in row] for row in DATA[list(header)].to_numpy()]
    made = content(root, rows=60, table_header=header, table_rows=rows)
    plot = plot_data(DATA, [0, 1, 2, 3])
    findings = ("trellis <b>won</b>.", "And more.")
    made = replace(made, marks=marks_of(DATA, header), plot=plot, findings=findings)
    write_page(root / "p.html", made)
    return root / "p.html"


@pytest.fixture
def first_page(browser_page, first):
    browser_page.goto(first.as_uri())
    return browser_page


def point(page, name: str):
    return page.locator(".point").filter(has=page.locator("circle")).and_(page.locator(f"[aria-label^='{name}']"))


def test_what_won_stands_above_the_table_and_paired_metrics_stand_first(first_page):
    assert first_page.locator(".finding").all_inner_texts() == ["trellis <b>won</b>.", "And more."]
    shown = first_page.get_by_role("region", name="Table of results")
    assert shown.locator("thead th").all_inner_texts() == ["method", "bits_per_weight", "psnr_to_fp", "mib"]
    folded = first_page.get_by_role("region", name="Table of other metrics")
    assert not folded.is_visible()
    first_page.get_by_text("Other metrics: fid").click()
    assert folded.locator("thead th").all_inner_texts() == ["method", "fid"]
    assert not first_page.get_by_label("Protocol").last.is_visible()
    first_page.get_by_text("Protocol", exact=True).click()
    assert first_page.locator(".notes").is_visible()


def test_the_best_of_a_column_and_the_front_are_marked(first_page):
    shown = first_page.get_by_role("region", name="Table of results")
    assert shown.locator("strong").all_inner_texts() == ["3.7", "25.0", "1.6"]
    marked = shown.locator("tr").filter(has=first_page.locator(".front"))
    assert marked.count() == 1 and "trellis" in marked.inner_text()
    first_page.get_by_text("Other metrics: fid").click()
    assert first_page.get_by_role("region", name="Table of other metrics").locator("strong").all_inner_texts() == [
        "1.1"
    ]


def test_the_plots_points_stand_by_their_numbers(first_page):
    """Places are linear in bits and PSNR, however the axes lie."""
    places = {}
    for name in DATA["method"][1:]:
        box = point(first_page, name.replace('"', '\\"').replace("'", "")).locator("circle").bounding_box()
        places[name] = (box["x"], box["y"])
    ours = DATA[1:][["bits_per_weight", "psnr_to_fp"]].to_numpy()
    drawn = np.array(list(places.values()))
    for axis, sign in ((0, 1), (1, -1)):
        steps, expected = np.diff(drawn[:, axis]), sign * np.diff(ours[:, axis])
        assert steps / steps[1] == pytest.approx(expected / expected[1], rel=0.03, abs=0.01)
    assert first_page.locator("#plot .label").all_text_contents() == list(DATA["method"][1:]), "labelled at the points"
    assert first_page.locator("#plot .frontier").get_attribute("points").count(",") == 1


def test_pointing_at_a_row_shows_its_numbers(first_page):
    tip = first_page.locator("#plot-tip")
    assert not tip.is_visible()
    point(first_page, "RTN 4 bit").hover()
    lines = tip.locator("div").all_inner_texts()
    assert lines[:2] == ["RTN 4 bit", "PSNR to full precision, dB: 20.00 ± 0.50"]
    assert "bits per weight, everything counted: 4.80" in lines and "MiB on disk: 2.10" in lines
    first_page.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    choice(first_page, "Metric").select_option(label="FID ↓")
    point(first_page, "trellis").focus()
    assert tip.locator("div").nth(1).inner_text() == "FID: 1.300 ± 0.100"
    assert first_page.locator("#plot .label").first.text_content() == "full precision"
    choice(first_page, "Size").select_option(label="MiB on disk")
    assert (
        point(first_page, "trellis")
        .get_attribute("aria-label")
        .startswith("trellis, FID: 1.300 ± 0.100, MiB on disk: 1.60")
    )


@pytest.mark.parametrize("by_keyboard", [False, True])
def test_a_click_on_a_row_shows_its_images_the_worst_first(first_page, first, by_keyboard):
    if by_keyboard:
        point(first_page, "trellis").focus()
        first_page.keyboard.press("Enter")
    else:
        point(first_page, "trellis").click()
    scores = [psnr(image_file(first, 0, row), image_file(first, 3, row)) for row in range(60)]
    worst = int(np.argmin(scores))
    assert choice(first_page, "Order").input_value() == "3"
    assert active(first_page) == f"trellis, prompt {worst + 1}: enlarge"
    expect(first_page.locator("#grid .row").first).to_be_in_viewport()
    assert first_page.locator(".chosen").count() == 50


def test_the_navigation_stays_and_says_where_one_is(first_page):
    bar = first_page.locator(".bar")
    for name in ("How it was made", "Images", "Results"):
        first_page.get_by_role("link", name=name).click()
        expect(first_page.get_by_role("link", name=name)).to_have_attribute("aria-current", "true")
        expect(first_page.locator("nav [aria-current]")).to_have_count(1)
        assert bar.bounding_box()["y"] == 0
        heading = first_page.get_by_role("heading", name=name, exact=True).bounding_box()
        assert heading["y"] >= bar.bounding_box()["height"], "the heading is not behind the bar"


@pytest.mark.parametrize("width", [390, 1280])
def test_plot_and_tables_stay_within_the_window(first_page, width):
    first_page.set_viewport_size({"width": width, "height": 844})
    expect(first_page.locator("#plot")).to_have_js_property(
        "clientWidth", first_page.evaluate("document.getElementById('plot-holder').clientWidth")
    )
    assert first_page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for name in ("RTN 4 bit", "trellis"):
        point(first_page, name).hover()
        tip, holder = (first_page.locator(id_).bounding_box() for id_ in ("#plot-tip", "#plot-holder"))
        assert tip["x"] >= holder["x"] and tip["x"] + tip["width"] <= holder["x"] + holder["width"] + 1

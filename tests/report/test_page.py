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
import pytest
from PIL import Image
from playwright.sync_api import expect

from vqdm.errors import UserError
from vqdm.report.gallery import LARGEST, WEBP_QUALITY
from vqdm.report.page import PageContent, PageMethod, write_page

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
    assert "</ul><script>alert(4)</script>" in page.locator(".notes").inner_text()
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
    assert choice(page, "Score").input_value() == "1", "PSNR is what is shown first"
    choice(page, "Order").select_option(label="worst of any method first")
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


def test_five_hundred_prompts_open_fast(tmp_path, browser_page, capsys):
    made = content(tmp_path, rows=500, noise={f"method {i}": 3 * i for i in range(8)})
    write_page(tmp_path / "p.html", made, max_mib=64)
    browser_page.goto((tmp_path / "p.html").as_uri())
    count = "[...document.querySelectorAll('#grid img')].filter(i => i.src && i.complete).length"
    rows = browser_page.locator("#grid .row")
    assert browser_page.locator("#grid img").count() == 4000
    at_load = browser_page.evaluate(count)
    ready = browser_page.evaluate("performance.getEntriesByName('ready')[0].startTime")
    parsed = browser_page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
    with capsys.disabled():
        print(f"\n500 prompts × 8 methods, {(tmp_path / 'p.html').stat().st_size / 2**20:.1f} MiB: ", end="")
        print(f"gallery ready after {ready:.0f} ms, parsed after {parsed:.0f} ms, {at_load} images decoded")
    assert at_load < 100
    for row in (0, 400):
        rows.nth(row).evaluate("row => row.scrollIntoView()")
        wait_for_source(browser_page.locator(f"#grid .row:nth-child({row + 1}) img").last)
    assert 0 < browser_page.evaluate(count) < 400

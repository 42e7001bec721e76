"""The vote page in a real browser: from the first pair to the file that is scored; and what its source gives away."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from vote_studies import CAPTIONS, write_run

from vqdm.errors import UserError
from vqdm.report.votes.ballots import read_ballot, read_key
from vqdm.report.votes.images import chosen_images, image_set
from vqdm.report.votes.page import page_html, write_study
from vqdm.report.votes.study import DESTROYED, Protocol, comparisons_of, draw_trials

SYSTEMS = {"clean_run": 0.0, "grainy_run": 25.0}
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>{{script}} & a 'cat'"


def make(folder, *, captions=CAPTIONS, seed=0, checks=1, pages=1, quality=None, systems=SYSTEMS, protocol=None):
    """(pages, key) of a study of two runs whose images differ in grain, and so in the size of their files."""
    for name, noise in systems.items():
        write_run(folder, name, captions=captions, noise=noise)
    sets = [image_set(folder, name, "tiny") for name in systems]
    images = chosen_images(sets, n=None, per_prompt=None)
    comparisons = comparisons_of(list(systems), None)
    trials = draw_trials(comparisons, images, seed=seed, pages=pages, checks=checks, original=next(iter(systems)))
    files = write_study(
        folder / "votes" / "clean-against-grainy", trials, {own.system: own for own in sets},
        protocol=protocol or Protocol(), size=None, quality=quality, seed=seed, about={"comparisons": comparisons},
    )  # fmt: skip
    return files, read_key(files[0].parent / "key.json")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    files, key = make(folder, captions=CAPTIONS[:4])
    return folder, files[0], key


def open_page(page, file):
    page.goto(file.as_uri())
    return page


def enter(page, file, rater):
    open_page(page, file).keyboard.type(rater)  # the field has the focus
    page.keyboard.press("Enter")
    return ready(page)


def ready(page, number=None):
    """Wait until a choice is taken; of the pair of this number."""
    if number is not None:
        page.wait_for_function("n => document.getElementById('number').textContent.startsWith(`${n} /`)", arg=number)
    page.wait_for_selector("#choose-tie:enabled")
    return page


def pixels(page, side):
    source = page.locator(f"#image-{side}").get_attribute("src")
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def saved(page, button, folder):
    with page.expect_download() as download:
        page.get_by_role("button", name=button).press("Enter")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


@pytest.mark.parametrize(("rater", "flip"), [("bob", True), ("cy", False)])
def test_from_the_first_pair_to_the_file_by_keyboard_alone(browser_page, study, tmp_path, rater, flip):
    folder, file, key = study
    trials = list(key.trials.values())
    enter(browser_page, file, rater)
    keys = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "t"}
    for number, trial in enumerate(reversed(trials) if flip else trials, start=1):
        ready(browser_page, number)
        assert browser_page.locator("#caption").inner_text() == trial.caption
        for side, listed in zip(("left", "right"), ("right", "left") if flip else ("left", "right"), strict=True):
            if (system := getattr(trial, listed)) != DESTROYED:
                source = image_set(folder, system, "tiny").path(trial.prompt, trial.copy)
                assert np.array_equal(pixels(browser_page, side), np.asarray(Image.open(source)))
        wanted = trial.expected or ("left" if trial.left == "clean_run" else "right")
        seen = {"left": "right", "right": "left", "tie": "tie"}[wanted] if flip else wanted
        browser_page.keyboard.press(keys[seen])
    browser_page.get_by_role("heading", name="Thank you").wait_for()
    ballot = read_ballot(saved(browser_page, "Save votes", tmp_path), key)
    assert (ballot.rater, ballot.page) == (rater, 1)
    assert {vote.pair: vote.choice for vote in ballot.votes} == {
        t.pair: t.expected or ("left" if t.left == "clean_run" else "right") for t in trials
    }
    assert all(vote.ms >= 300 for vote in ballot.votes)


def test_undo_reload_and_saving_in_between(browser_page, study, tmp_path):
    _, file, key = study
    page = enter(browser_page, file, "cy")
    total = len(key.trials)
    for number, button in enumerate(("ArrowLeft", "ArrowDown", "ArrowRight"), start=1):
        ready(page, number).keyboard.press(button)
    ready(page, 4).keyboard.press("u")
    ready(page, 3).keyboard.press("ArrowLeft")
    ready(page, 4)
    early = json.loads(saved(page, "Save", tmp_path).read_text())
    assert [vote["choice"] for vote in early["votes"]] == ["left", "tie", "left"]
    assert early["votes"][2]["ms"] > 600  # of both showings, 300 ms at least each
    page.reload()
    page.get_by_text(f"3 of {total} votes by cy are kept here.", exact=True).wait_for()  # after loading
    assert page.get_by_label("Your rater name").input_value() == "cy"
    page.get_by_role("button", name="Go on").click()
    ready(page, 4)
    for number in range(4, total + 1):
        ready(page, number).keyboard.press("ArrowDown")
    page.get_by_role("button", name="Back to the last pair").click()
    ready(page, total).keyboard.press("ArrowRight")
    ballot = read_ballot(saved(page, "Save votes", tmp_path), key)
    assert [v.seen for v in ballot.votes] == ["left", "tie", "left", *["tie"] * (total - 4), "right"]
    page.reload()
    assert f"{total} of {total} votes by cy" in page.locator("#kept").inner_text()


def test_raters_of_one_browser_are_kept_apart(browser_page, study):
    _, file, _ = study
    enter(browser_page, file, "ann").keyboard.press("ArrowLeft")
    ready(browser_page, 2)
    page = open_page(browser_page, file)
    page.get_by_label("Your rater name").fill("Bob")
    assert page.locator("#kept").inner_text() == "" and page.get_by_role("button", name="Start").is_visible()
    page.keyboard.press("Enter")
    ready(page, 1)
    page.reload()
    assert page.get_by_label("Your rater name").input_value() == "bob"


def test_a_name_that_cannot_be_a_name_does_not_start(browser_page, study):
    page = open_page(browser_page, study[1])
    for name in ("", "two words", "<b>", "ä", "x" * 33):
        page.get_by_label("Your rater name").fill(name)
        page.keyboard.press("Enter")
        if len(name) <= 32:
            assert page.locator("#start").is_visible()
    assert len(page.get_by_label("Your rater name").input_value()) <= 32


def test_keys_that_are_held_or_part_of_shortcuts_or_too_early_are_no_votes(browser_page, study):
    page = enter(browser_page, study[1], "cy")
    page.keyboard.down("ArrowLeft")
    for _ in range(5):
        page.keyboard.down("ArrowLeft")  # playwright repeats a key that is down
    ready(page, 2)
    page.keyboard.down("ArrowLeft")
    page.keyboard.up("ArrowLeft")
    page.keyboard.press("Control+u")
    page.keyboard.press("Alt+ArrowRight")
    ready(page, 2).keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # nobody has looked at the next pair yet
    ready(page, 3)
    page.wait_for_timeout(500)
    assert page.locator("#number").inner_text().startswith("3 /")


def test_a_phone_shows_everything_at_once_and_takes_taps(browser_page, study):
    browser_page.set_viewport_size({"width": 390, "height": 664})
    page = open_page(browser_page, study[1])
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.get_by_label("Your rater name").fill("cy")
    page.get_by_role("button", name="Start").click()
    ready(page)
    sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert sizes == [390, 664]
    boxes = [page.locator(f"#image-{side}").bounding_box() for side in ("left", "right")]
    for side, least in (("width", 300), ("height", 180)):
        assert boxes[0][side] == pytest.approx(boxes[1][side], abs=0.1) and boxes[0][side] > least
    for control in ("#undo", "#save", "#choose-left", "#choose-tie", "#choose-right", "#image-left", "#image-right"):
        box = page.locator(control).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 664, control
    assert page.locator("#choose-tie").bounding_box()["height"] >= 44
    page.locator("#image-right").dblclick()  # one vote, not two
    ready(page, 2)
    assert page.evaluate("state.votes.map((vote) => vote.choice)") == ["right"]


def test_captions_are_text_whatever_they_say(browser_page, tmp_path):
    files, _ = make(tmp_path, captions=[HOSTILE, "b" * 900], checks=0)
    page = enter(browser_page, files[0], "cy")
    shown = {page.locator("#caption").inner_text()}
    page.keyboard.press("ArrowLeft")
    ready(page, 2)
    shown.add(page.locator("#caption").inner_text())
    assert shown == {HOSTILE, "b" * 900}
    assert page.locator("img").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_screen_readers_find_every_part_by_name(browser_page, study):
    page = enter(browser_page, study[1], "cy")
    for name in ("A is better", "Tie", "B is better", "Undo", "Save"):
        assert page.get_by_role("button", name=name).count() == 1
    for name in ("Image A", "Image B"):
        assert page.get_by_role("img", name=name).count() == 1
    assert page.get_by_role("progressbar", name="Pairs done").count() == 1
    assert page.get_by_role("group", name="Which of the two images do you prefer for this caption?").count() == 1
    assert page.locator("[aria-live=polite]").inner_text().startswith("Pair 1 of ")
    assert page.get_by_role("main").count() == 1  # of those that are not hidden


CONTRAST = """(selector) => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let element = document.querySelector(selector);
  const text = light(getComputedStyle(element).color);
  while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
  const ground = light(getComputedStyle(element).backgroundColor);
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser_page, study, scheme):
    browser_page.emulate_media(color_scheme=scheme)
    page = open_page(browser_page, study[1])
    for selector in ("h1", ".small", "button.main", ".keys kbd", "#caption", "#number", "#choose-left"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


def test_without_storage_it_says_so_and_still_works(browser_page, study, tmp_path):
    browser_page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})")
    page = open_page(browser_page, study[1])
    assert page.get_by_text("does not keep votes").is_visible()
    page.keyboard.type("cy")
    page.keyboard.press("Enter")
    ready(page, 1).keyboard.press("ArrowLeft")
    ready(page, 2)
    assert len(read_ballot(saved(page, "Save", tmp_path), study[2]).votes) == 1


def test_what_was_kept_and_is_damaged_is_not_believed(browser_page, study):
    _, file, key = study
    page = open_page(browser_page, file)
    for kept in ("{", "null", "{}", '{"votes":[{"pair":"p99","choice":"left","ms":1}]}', '{"votes":[null]}'):
        page.evaluate("([name, kept]) => localStorage.setItem(name, kept)", [f"votes/{key.study}/1/cy", kept])
        enter(page, file, "cy")
        ready(page, 1)
        page.evaluate("localStorage.removeItem('votes/rater')")


def test_the_policy_stops_what_is_not_the_pages_own(chromium, study):
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto(study[1].as_uri())
    page.evaluate("""() => {
      document.body.append(Object.assign(document.createElement("script"), {textContent: "window.foreign = 1"}));
      document.body.append(Object.assign(document.createElement("style"), {textContent: "h1 {color: rgb(1, 2, 3)}"}));
    }""")
    assert page.evaluate(
        "window.foreign === undefined && getComputedStyle(document.querySelector('h1')).color"
    ) not in (
        False,
        "rgb(1, 2, 3)",
    )
    assert page.evaluate("fetch('data:text/plain,x').then(() => 'sent', () => 'stopped')") == "stopped"
    context.close()


def content_of(file):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', file.read_text(), re.DOTALL)[1])


@pytest.mark.parametrize("quality", [None, 90])
def test_the_source_gives_no_system_away(tmp_path, quality):
    files, key = make(tmp_path, captions=[f"picture {i}" for i in range(24)], checks=2, quality=quality)
    text = files[0].read_text()
    for secret in (*SYSTEMS, "method of", "secret-", "prompt-0", "images-", "destroyed", "identical", str(tmp_path)):
        assert secret not in text
    assert not any(name in files[0].name for name in SYSTEMS)
    content = content_of(files[0])
    assert set(content) == {"study", "page", "pages", "question", "type", "small", "pairs"}
    images = [(trial, pair[side]) for trial, pair in zip(key.trials.values(), content["pairs"], strict=True)
              for side in ("left", "right")]  # fmt: skip
    assert all(set(pair) == {"id", "caption", "left", "right"} for pair in content["pairs"])
    assert len({len(data) for _, data in images}) == 1  # though grainy files are larger
    for _, data in images:
        raw = base64.b64decode(data)
        assert b"secret" not in raw and b"tEXt" not in raw and b"Exif" not in raw
        assert Image.open(io.BytesIO(raw)).convert("RGB").size == (32, 32)
    ordinary = [trial for trial in key.trials.values() if trial.check is None]
    assert sum(trial.left == "clean_run" for trial in ordinary) == len(ordinary) / 2


def test_grain_would_have_shown_in_the_files_sizes(tmp_path):
    sizes = {name: write_run(tmp_path, name, noise=noise) for name, noise in SYSTEMS.items()}
    clean, grainy = ([p.stat().st_size for p in (d / "images").iterdir()] for d in sizes.values())
    assert max(clean) < min(grainy)


def test_the_same_call_makes_the_same_pages_and_another_study_is_not_overwritten(tmp_path):
    files, key = make(tmp_path, pages=2)
    before = [file.read_bytes() for file in files]
    again, _ = make(tmp_path, pages=2)
    assert [file.read_bytes() for file in again] == before
    assert len(files) == 2 and all(key.study in file.name for file in files)
    with pytest.raises(UserError, match=r"is the key of another study .*give another --study"):
        make(tmp_path, pages=2, seed=1)


def test_a_page_that_no_browser_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vqdm.report.votes.page.LARGEST_PAGE", 10_000)
    with pytest.raises(UserError, match="give more --pages"):
        make(tmp_path)
    assert not (tmp_path / "votes").exists()


def test_the_page_loads_nothing():
    html = page_html({"pairs": []}).decode()
    assert "default-src 'none'" in html and "unsafe" not in html
    assert not re.search(r"https?://|src=(?!')|url\(|@import", html)

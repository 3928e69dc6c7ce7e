"""The page in Chromium: pictures, a sound, a folder, clicks on words; no console error, and no request to anyone else."""

import shutil

import pytest
from PIL import Image

import paging

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def url(page_world, chromium):
    checkpoints = [page_world / f"{name}.pt" for name in ("first", "second", "sounds")]
    with paging.serving(*checkpoints, examples=[page_world / "pictures/4.jpg"]) as url:
        yield url


@pytest.fixture
def visit(chromium, url):
    visit = paging.Visit(chromium, url, viewport={"width": 1200, "height": 900})
    yield visit
    visit.context.close()
    assert visit.said == []


def test_a_picture_is_captioned_by_both_checkpoints_and_its_words_can_be_clicked(visit, page_world):
    said = visit.give("picture", page_world / "pictures/3.jpg")
    page, results = visit.page, visit.page.locator("#picture-captions .result")
    assert results.count() == 2
    assert said.index("first") < said.index("second")
    assert page.get_by_role("region", name="Captions by first").is_visible()
    word = results.nth(1).locator("button.word").first
    word.focus()
    page.keyboard.press("Enter")
    assert word.get_attribute("aria-pressed") == "true"
    assert results.nth(1).locator(".bars li").count() == 4
    assert results.nth(0).locator(".bars li").count() == 0
    word.click()
    assert results.nth(1).locator(".bars li").count() == 0


@pytest.mark.slow
def test_decoding_is_switched(visit, page_world):
    visit.give("picture", page_world / "pictures/5.jpg")
    page = visit.page
    shown = visit.shown("picture")
    page.get_by_text("Decoding", exact=True).first.click()
    page.get_by_role("radio", name="sampling").check()
    page.get_by_label("number input for Captions").fill("3")
    page.get_by_role("button", name="Caption the picture").click()
    visit.answer("picture", shown)
    assert page.locator("#picture-captions .result").first.locator("li").count() == 3


@pytest.mark.slow
def test_an_example_is_captioned(visit):
    visit.page.locator("button.gallery-item").first.click()
    assert "first" in visit.answer("picture", "")


@pytest.mark.slow
def test_a_broken_file_is_a_message_and_the_next_picture_is_captioned(visit, page_world):
    (page_world / "broken.jpg").write_bytes(b"no picture")
    assert "cannot be captioned: not a picture" in visit.give("picture", page_world / "broken.jpg")
    assert visit.page.get_by_role("alert").first.is_visible()
    visit.page.get_by_label("Remove Image").click()
    assert "first" in visit.give("picture", page_world / "pictures/1.jpg")


@pytest.mark.slow
def test_sixty_megapixels_are_captioned(visit, page_world):
    Image.linear_gradient("L").resize((10_000, 6_000)).save(page_world / "large.jpg", quality=30)
    assert "first" in visit.give("picture", page_world / "large.jpg")


@pytest.mark.slow
def test_a_sound_is_captioned(visit, page_world):
    visit.page.get_by_role("tab", name="Sound").click()
    visit.page.wait_for_selector("#sound input[type=file]", state="attached")
    assert visit.give("sound", page_world / "rain.wav").startswith("sounds")


@pytest.mark.slow
def test_a_folder_is_captioned_with_a_table_to_download(visit, page_world, tmp_path):
    for name in ("pictures/1.jpg", "pictures/2.jpg", "rain.wav"):
        shutil.copy(page_world / name, tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_text("no picture")
    page = visit.page
    page.get_by_role("tab", name="Folder").click()
    page.wait_for_selector("#folder input[type=file]", state="attached")
    said = visit.give("folder", tmp_path)
    assert [card.get_attribute("alt") for card in page.locator("#folder-captions img").all()] != []
    assert page.locator("#folder-captions .result").count() == 3
    assert all(name in said for name in ("1.jpg", "2.jpg", "rain.wav", "broken.png: this file cannot be captioned: not a picture"))
    assert "notes.txt" not in said
    with page.expect_download() as download:
        page.locator("#table a").first.click()
    table = download.value.path().read_text()
    assert table.startswith("image_id,file,rank,first,score first,second,score second\n")
    assert len(table.splitlines()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
], ids=["phone", "dark"])  # fmt: skip
def test_the_page_fits_a_phone_and_a_dark_room(chromium, url, page_world, settings):
    visit = paging.Visit(chromium, url, **settings)
    visit.give("picture", page_world / "pictures/3.jpg")
    visit.page.locator("#picture-captions button.word").first.click()
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    text, ground = visit.page.evaluate(
        "() => { const style = getComputedStyle(document.querySelector('.result .caption'));"
        " return [style.color, getComputedStyle(document.querySelector('.result')).backgroundColor]; }"
    )
    light = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (text, ground)]
    assert abs(light[0] - light[1]) > 150 and (light[0] > light[1]) == (settings.get("color_scheme") == "dark")
    visit.context.close()
    assert visit.said == []


@pytest.mark.slow
def test_what_takes_input_has_a_name_for_screen_readers(visit):
    visit.page.get_by_text("Decoding", exact=True).first.click()
    nameless = visit.page.evaluate("""() => [...document.querySelectorAll('input:not([type=file]), textarea, select, button')]
        .filter((one) => one.offsetParent !== null)
        .filter((one) => !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.title || one.innerText.trim()
            || one.closest('label') || (one.id && document.querySelector(`label[for="${one.id}"]`)) || one.querySelector('img[alt]')))
        .map((one) => one.outerHTML.slice(0, 200))""")
    assert nameless == []

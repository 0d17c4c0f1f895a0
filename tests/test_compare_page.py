"""The page of a comparison, as a file and in a real browser."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cifar import compare, compare_page
from cifar.errors import UserError
from handmade import erring_run


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two runs of which one is better, and one of another test set."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        erring_run(folder / "a", range(30)),
        erring_run(folder / "b", range(3), seed=1),
        erring_run(folder / "<b>c", range(7), test_sha256="other"),
    ]
    return compare_page.write(compare.compare(found), folder / "compare" / "a page")


def test_numbers_figure_and_page_are_written(page):
    assert {path.name for path in page.parent.iterdir()} == {"comparison.html", "comparison.json", "comparison.png"}
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert page.stat().st_size < 1_000_000


def test_a_folder_that_cannot_be_written_is_one_sentence(page, tmp_path):
    (tmp_path / "file").write_text("")
    comparison = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="cannot write"):
        compare_page.write(comparison, tmp_path / "file" / "folder")


@pytest.fixture(scope="module")
def opened(page, browser):
    """The browser, where the page has just been opened."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what other pages left
    browser.get(page.as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def cells(opened, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, as they are shown."""
    script = """
        const heading = [...document.querySelectorAll("h2")].find(one => one.innerText === arguments[0]);
        let table = heading; while (!table.querySelector("table")) table = table.nextElementSibling;
        return [...table.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.innerText));
    """
    return opened.execute_script(script, heading)


def test_every_number_on_the_page_is_the_saved_one(opened, page):
    saved = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [item.text for item in opened.find_elements("css selector", ".verdicts li")] == [
        text[0].upper() + text[1:] for text in (saved["pairs"][0]["verdict"], *saved["notes"])
    ]
    for row, run in zip(cells(opened, "Runs"), saved["runs"], strict=True):
        assert row[1] == f"{run['subject']}\n{run['run']}"
        low, high = run["interval_95"]
        assert (row[0], row[2], row[3]) == (
            run["letter"],
            f"{run['accuracy']:.2%}",
            f"{100 * low:.2f} to {100 * high:.2f}",
        )
        assert row[6:] == ["0.5000", "2.00%", "9.5", "9.5"]
    (pair,) = cells(opened, "Pairs")
    assert pair[:5] == ["A and B", "300", "0", "27", "+9.00"]
    assert float(pair[6]) == pytest.approx(2 / 2**27, rel=0.01)
    assert pair[-1] == "B"
    for row, one in zip(cells(opened, "Recall by class"), saved["classes"], strict=True):
        assert row[:4] == [one["class"], *(f"{share:.2%}" for share in one["recall"])]
        assert row[4] == f"{100 * one['difference'][0]:+.2f}"
        assert (row[5] == "", row[7]) == (False, "")
    assert cells(opened, "Settings that differ") == [["seed", "0", "1", "0"]]


def test_a_click_on_a_head_sorts_by_numbers_and_another_turns_it_round(opened):
    head = opened.find_elements("css selector", "thead th button")[2]
    assert head.text == "accuracy"
    for expected in (["A", "C", "B"], ["B", "C", "A"]):
        head.click()
        assert [row[0] for row in cells(opened, "Runs")] == expected


def test_it_asks_no_network_and_makes_no_error_and_fits_a_phone_in_light_and_dark(opened, page):
    backgrounds = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        opened.get(page.as_uri())
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        backgrounds.add(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "chrome:"))} == {page.as_uri()}  # chrome: an empty tab

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cifar import analysis, evaluate, records, report, visualize
from cifar.config import FIELDS
from cifar.data import Dataset
from cifar.errors import UserError
from cifar.runs import Run
from cifar.visualize import FIGURES
from handmade import CLASSES, PREDICTED, RECORD, TRUE, make_dataset, make_metrics, make_run


class Page(HTMLParser):
    """The texts of each table's rows by the table's id, and all visible text; with a dataset it is written first."""

    def __init__(self, run: Run, dataset: Dataset | None = None):
        super().__init__()
        if dataset:
            report.write(run, dataset)
        self.tables, self.rows, self.tag, self.text = {}, [], "", ""
        self.source = (run.path / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())
        for rows in self.tables.values():
            rows[:] = [[" ".join(cell.split()) for cell in row] for row in rows]

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.text += " "
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tag not in ("style", "script"):
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.tag = ""
        if tag == "table":
            self.rows = []


def percent(fraction: float, decimals: int = 2) -> str:
    return f"{100 * fraction:.{decimals}f}%"


def test_every_number_is_from_the_runs_files(corrupted_run):
    page, metrics, corruptions = Page(corrupted_run), corrupted_run.metrics, corrupted_run.read("corruptions.json")
    after, precisions = metrics.calibration.after, metrics.average_precision
    accuracies = (metrics.accuracy, *metrics.interval_95), (metrics.accuracy_tta, *metrics.interval_95_tta)
    for title, numbers in zip(("Accuracy", "Accuracy with test-time augmentation"), accuracies):
        assert "{} {} 95% interval {} to {}".format(title, *map(percent, numbers)) in page.text
    assert f"Calibration error {percent(after.expected_calibration_error)}" in page.text
    assert f"99% accuracy {percent(metrics.selective.coverage_at_99_accuracy, 1)}" in page.text
    assert page.tables["per-class"][1:] == [
        [name, *map(percent, (row.precision, row.recall, row.f1, precisions[name])), str(row.support)]
        for name, row in metrics.per_class.items()
    ]
    pairs = [[pair.true, pair.predicted, str(pair.count)] for pair in metrics.most_confused]
    counts = np.array(metrics.confusion_matrix)
    np.fill_diagonal(counts, 0)
    assert page.tables["most-confused"][1:11] == pairs
    assert [int(row[2]) for row in page.tables["most-confused"][1:]] == sorted(counts[counts > 0], reverse=True)
    assert [row[1:] for row in page.tables["calibration"][1:]] == [
        [percent(part.expected_calibration_error), f"{part.negative_log_likelihood:.4f}"]
        for part in (metrics.calibration.before, after)
    ]
    for row, (kind, cells) in zip(page.tables["corruptions"][1:], corruptions.corruptions.items(), strict=True):
        means = [np.mean([getattr(cell, key) for cell in cells]) for key in ("accuracy", "expected_calibration_error")]
        assert row == [kind, *(percent(value, 1) for value in [*(cell.accuracy for cell in cells), *means])]


def test_the_page_says_how_the_run_was_made(corrupted_run):
    record, config, page = corrupted_run.record, corrupted_run.config, Page(corrupted_run)
    facts = dict(page.tables["provenance"])
    assert facts["SHA-256 of the training split"] == record.dataset.train_sha256
    assert facts["torch"] == record.versions["torch"]
    assert facts["seconds: train"] == str(record.seconds["train"])
    rows = page.tables["settings"][1:]
    assert [row[0] for row in rows] == list(FIELDS)
    values = {row[0]: row[1] for row in rows}
    assert (values["epochs"], values["mirror"]) == (str(config.epochs), "not set")
    assert f"{record.model.parameters:,}" in page.text


def test_settings_without_effect_or_unknown_to_the_run_are_not_shown_as_if_they_counted(tmp_path):
    run = make_run(tmp_path)
    content = run.config.replace(model="simple", optimizer="adam", val_size=0, crop=0, hard_epochs=0, small_epochs=0)
    run.write("config.json", {name: value for name, value in content.model_dump().items() if name != "cutout"})
    values = {row[0]: row[1] for row in Page(run, make_dataset()).tables["settings"][1:]}
    without_effect = {"momentum", "patience", "crop_mode", "small_size", "hard_share"}
    without_effect |= {"early_stopping", "body_lr", "decay_rate", "decay_epochs"}
    assert {name for name, value in values.items() if value == "no effect"} == without_effect
    assert values["cutout"] == "not set"


def test_images_of_a_folder_are_named_by_their_files(tmp_path):
    run = make_run(tmp_path)
    files = [f"test/{CLASSES[label]}/IMG {index} \udce9.jpg" for index, label in enumerate(TRUE)]  # not in UTF-8
    pairs = run.read("analysis.json").model_dump()["confused_pairs"]
    run.write("analysis.json", analysis.analyze(np.eye(3)[list(PREDICTED)], np.array(TRUE), CLASSES, pairs, files))
    page = Page(run, make_dataset())
    for name in ("cat/IMG 3", "ship/IMG 8", "ship/IMG 9"):
        assert f"test/{name} \\udce9.jpg " in page.text
    assert "#3" not in page.text
    assert "and the file" in page.text


def test_every_figure_and_every_image_of_the_analysis_is_shown(corrupted_run):
    page = Page(corrupted_run)
    for image in analysis.images(corrupted_run.read("analysis.json")):
        caption = rf"{image.predicted} {percent(image.confidence, 1)} labeled {image.true} [\d.]+% #{image.index}\b"
        assert re.search(caption, page.text)
        assert f'alt="Test image {image.index}, labeled {image.true}"' in page.source
        assert f'alt="Saliency for &#34;{image.predicted}&#34;"' in page.source.replace("&quot;", "&#34;")
    for spec in FIGURES.values():
        assert page.source.count(f'alt="{spec.alt}"') == page.source.count(f'alt="{spec.alt}" width=') == 1


def make_large_run(path: Path, count: int) -> Run:
    """A run of that many classes with long names that look like HTML, drawn and reported."""
    classes = [f"<b>aquarium_fish_{number}</b>" + "x" * 200 for number in range(count)]
    rng, images = np.random.default_rng(0), 3 * count
    true, confidence = np.arange(images) % count, rng.uniform(0.3, 1, images)
    predicted = np.where(rng.random(images) < 0.6, true, rng.integers(0, count, images))
    run = make_run(path, classes, true=true, predicted=predicted, confidence=confidence)
    visualize.visualize(run, make_dataset(classes, true.tolist()))
    report.write(run, make_dataset(classes, true.tolist()))
    return run


@pytest.fixture(scope="module")
def large_run(tmp_path_factory) -> Run:
    return make_large_run(tmp_path_factory.mktemp("large"), 130)


@pytest.mark.parametrize("count", [130, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_classes_are_all_listed_escaped_and_bounded_in_bytes_and_pixels(large_run, tmp_path, count):
    run = large_run if count == 130 else make_large_run(tmp_path, count)
    page, figures = Page(run), [*run.figures.iterdir()]
    names = [f"<b>aquarium_fish_{number}</b>" + "x" * 200 for number in range(count)]
    assert [row[0] for row in page.tables["per-class"][1:]] == names
    assert "<b>aquarium" not in page.source
    assert all(page.source.count(f'alt="{FIGURES[path.stem].alt}"') == 1 for path in figures)
    assert len(page.source) + sum(path.stat().st_size for path in figures) < 5e6
    assert max(int(pixels) for pixels in re.findall(r'(?:width|height)="(\d+)"', page.source)) < 2500


def test_a_run_without_mistakes_and_without_validation_has_a_page(tmp_path):
    run = make_run(tmp_path, predicted=TRUE)
    calibration = make_metrics(fitted_on=0)["calibration"]
    run.write("metrics.json", run.metrics.model_dump() | {"calibration": calibration})
    page = Page(run, make_dataset())
    assert "No image is misclassified." in page.text
    assert "no temperature scaling" in page.text


def copy_without(run: Run, path: Path, *names: str) -> Run:
    """Copy the run's directory without some of its files."""
    shutil.copytree(run.path, path, ignore=lambda _, found: set(found) & {*names, "report.html"})
    return Run(path)


def test_what_is_missing_is_left_out(corrupted_run, digits, tmp_path):
    bare = copy_without(corrupted_run, tmp_path / "bare", "corruptions.json", "analysis.json", "saliency.npz")
    page = Page(bare, digits)
    assert "corruptions" not in page.tables
    assert "Robustness to corruptions" not in page.text
    assert "Potential label errors" not in page.text
    missing = ("corruptions.json", "analysis.json", "metrics.json", "predictions.csv", "figures")
    trained = copy_without(corrupted_run, tmp_path / "trained", *missing)
    trained.write("run.json", RECORD)  # as an earlier version wrote it
    trained.update(status="failed", error="the loss is not finite at epoch 2", note="Not CIFAR-10.")
    page = Page(trained, digits)
    assert "per-class" not in page.tables
    assert re.search(r"has not been evaluated.*invoke evaluate --run \S*trained", page.text)
    assert "This run failed: the loss is not finite at epoch 2" in page.text
    assert "Not CIFAR-10." in page.text


def test_an_analysis_of_another_test_split_is_named(tmp_path):
    run = make_run(tmp_path)
    content = run.read("analysis.json").model_dump()
    run.write("analysis.json", content | {"suspected_labels": [{**content["confident_mistakes"][0], "index": 12}]})
    with pytest.raises(UserError, match=r"analysis.json is damaged: it names images that are not in the test split"):
        report.write(run, make_dataset())


def open_page(browser, run: Run, width: int, mode: str) -> None:
    """Open the page from disk, at that width in pixels, light or dark, and clear the browser's logs first."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    browser.get((run.path / "report.html").as_uri())


def column(browser, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#per-class tbody tr')].map(row => row.cells[arguments[0]].innerText)"
    )
    return browser.execute_script(script, number)


def test_the_page_opens_from_disk_without_network_or_errors_and_sorts(browser, corrupted_run):
    open_page(browser, corrupted_run, 1280, "light")
    script = "return [...document.images].map(image => image.complete && image.naturalWidth)"
    loaded = browser.execute_script(script)
    assert len(loaded) > 30
    assert all(loaded)
    names = column(browser, 0)
    head = browser.find_elements("css selector", "#per-class th button")[1]
    orders = []
    for expected in ("ascending", "descending"):
        head.click()
        assert head.find_element("xpath", "..").get_attribute("aria-sort") == expected
        orders.append([float(text[:-1]) for text in column(browser, 1)])
    assert orders[0] == sorted(orders[0])
    assert orders[1] == sorted(orders[0], reverse=True)
    assert sorted(column(browser, 0)) == sorted(names)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in sent} == {"file", "data"}


def test_many_classes_can_be_searched(browser, large_run):
    open_page(browser, large_run, 1280, "light")
    script = "return [...document.querySelectorAll('#per-class tbody tr')].filter(row => row.offsetParent).length"
    assert browser.execute_script(script) == 130
    browser.find_element("css selector", "[data-table=per-class]").send_keys("FISH_12")
    assert browser.execute_script(script) == 11  # 12, and 120 to 129
    assert browser.execute_script("return document.documentElement.scrollHeight") < 12000


CUT = """
const elements = document.querySelectorAll("h1, h2, h3, p, nav a, table, li, .tile *, .pair img, summary");
const isSeen = element => !element.closest("details:not([open]) > :not(summary), .scroll") && element.offsetParent;
return [...elements].filter(isSeen).filter(element => {
  const box = element.getBoundingClientRect();
  return box.left < 0 || box.right > innerWidth || element.scrollWidth > element.clientWidth && element.clientWidth;
}).map(element => element.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_nothing_is_cut_and_text_is_readable(browser, corrupted_run, large_run, width, mode):
    for run in (corrupted_run, large_run):
        open_page(browser, run, width, mode)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(CUT) == []
        script = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        text, page = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in browser.execute_script(script))
        assert (text < 60 and page > 240) if mode == "light" else (text > 200 and page < 40)


def test_it_prints_dark_on_white_without_navigation(browser, corrupted_run):
    open_page(browser, corrupted_run, 1280, "dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element("css selector", "nav").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_metrics_are_printed_with_intervals_and_the_classes_of_lowest_f1(capsys):
    matrix = np.diag([*np.arange(1, 31), *[0] * 20])  # of the last 20 classes there are no images
    matrix[:30, 0] += 1
    content = make_metrics([f"n{number:02}" for number in range(50)], matrix)
    report.show_metrics(records.parse("metrics.json", content | {"interval_95": [0.41, 0.93], "dataset": "[b]"}))
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("fast on [b]: test split, 495 images", "94.14%", "41.00% to 93.00%", "94.34%", "0.5000", "top-5"):
        assert part in printed
    assert "the 20 of 30 classes with the lowest F1" in printed
    assert "n01" in printed
    assert not re.search("n29|n3.", printed.split("most confused")[0])
    assert "most confused: n01 predicted as n00, 1 time" in printed


def test_the_end_of_a_run_is_printed_and_there_and_on_the_page_that_it_has_learned_nothing(tmp_path, capsys):
    run = make_run(tmp_path, predicted=(0,) * 12)
    run.update(seconds={"train": 2.0, "evaluate": 0.5}, note="Not CIFAR-10.")
    report.show_run(run)
    printed = capsys.readouterr().out
    assert printed.startswith("train 2.0 s  evaluate 0.5 s  total 2.5 s\nrun directory: ")
    (problem, *_) = evaluate.learning_problems(run)
    for sentence in ("Not CIFAR-10.", problem):
        assert sentence in " ".join(printed.replace("│", "").split())
    assert f'<p class="note">{problem}</p>' in Page(run, make_dataset()).source

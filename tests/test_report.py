import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from cifar import analysis, metrics, predictions, report, visualize
from cifar.config import FIELDS, Config
from cifar.errors import UserError
from cifar.runs import Run
from handmade import make_dataset, make_line


class Tables(HTMLParser):
    """The texts of each table's rows, by the table's id, and all that is shown as text."""

    def __init__(self, page: str):
        super().__init__()
        self.tables, self.rows, self.cell, self.silent, self.text = {}, [], None, False, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.handle_data(" ")
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""
        self.silent = self.silent or tag in ("style", "script")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join(self.cell.split()))
            self.cell = None
        if tag in ("style", "script"):
            self.silent = False

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if not self.silent:
            self.text += data


def read(run: Run) -> tuple[dict[str, list[list[str]]], str]:
    parsed = Tables((run.path / "report.html").read_text(encoding="utf-8"))
    return parsed.tables, " ".join(parsed.text.split())


def percent(share: float, decimals: int = 2) -> str:
    return f"{100 * share:.{decimals}f}%"


def test_every_number_is_that_of_the_runs_files(corrupted_run):
    metrics, harmed = corrupted_run.read("metrics.json"), corrupted_run.read("corruptions.json")
    tables, text = read(corrupted_run)
    for title, kind in (("Accuracy", ""), ("Accuracy with test-time augmentation", "_tta")):
        low, high = metrics[f"interval_95{kind}"]
        assert f"{title} {percent(metrics[f'accuracy{kind}'])} 95% interval {percent(low)} to {percent(high)}" in text
    after = metrics["calibration"]["after"]
    assert f"Calibration error {percent(after['expected_calibration_error'])}" in text
    assert f"Answered at 99% right {percent(metrics['selective']['coverage_at_99_accuracy'], 1)}" in text
    assert tables["per-class"][1:] == [
        [
            name,
            *(percent(row[key]) for key in ("precision", "recall", "f1")),
            percent(metrics["average_precision"][name]),
            str(row["support"]),
        ]
        for name, row in metrics["per_class"].items()
    ]
    pairs = [[pair["true"], pair["predicted"], str(pair["count"])] for pair in metrics["most_confused"]]
    assert tables["most-confused"][1:] == pairs
    assert [row[1:] for row in tables["calibration"][1:]] == [
        [percent(part["expected_calibration_error"]), f"{part['negative_log_likelihood']:.4f}"]
        for part in (metrics["calibration"]["before"], after)
    ]
    for (kind, *cells), (name, rows) in zip(tables["corruptions"][1:], harmed["corruptions"].items(), strict=True):
        means = [np.mean([row[key] for row in rows]) for key in ("accuracy", "expected_calibration_error")]
        assert kind == name
        assert cells == [percent(share, 1) for share in [*(row["accuracy"] for row in rows), *means]]


def test_the_page_says_how_the_run_was_made(corrupted_run):
    record, config = corrupted_run.record, corrupted_run.config
    tables, text = read(corrupted_run)
    facts = dict(tables["provenance"])
    assert facts["SHA-256 of its training split"] == record["dataset"]["train_sha256"]
    assert facts["SHA-256 of its test split"] == corrupted_run.read("metrics.json")["test_sha256"]
    assert facts["commit"].startswith(record["commit"] or "")
    assert facts["torch"] == record["versions"]["torch"]
    assert facts["seconds: train"] == str(record["seconds"]["train"])
    assert [row[:2] for row in tables["settings"][1:]] == [[name, str(getattr(config, name))] for name in FIELDS]
    assert f"{record['model']['parameters']:,}" in text


def test_every_picture_of_the_analysis_is_shown_with_its_index_label_and_prediction(corrupted_run):
    _, text = read(corrupted_run)
    page = (corrupted_run.path / "report.html").read_text(encoding="utf-8")
    for picture in analysis.pictures(corrupted_run.read("analysis.json")):
        caption = rf"{picture['predicted']} {percent(picture['confidence'], 1)} labelled {picture['true']} [\d.]+%"
        assert re.search(rf"{caption} #{picture['index']}\b", text)
        assert f'alt="Test image {picture["index"]}, labelled {picture["true"]}"' in page
    assert {name for name in report._FIGURES if report._FIGURES[name] in page} == set(report._FIGURES)
    assert {path.stem for path in corrupted_run.figures.iterdir()} == set(report._FIGURES)


def make_run(path: Path, classes: list[str], count: int) -> tuple[Run, object]:
    """An evaluated and drawn run of random probabilities, and its dataset of as many images."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % len(classes)
    logits = rng.normal(size=(count, len(classes))).astype(np.float32)
    logits[np.arange(count), labels] += 2
    probabilities, dataset = softmax(logits.astype(float), axis=1), make_dataset(classes, labels.tolist())
    run = Run(path)
    run.write("config.json", asdict(Config(dataset="digits", val_size=0)))
    run.write("run.json", {"status": "completed", "start": "2026-01-01T00:00:00+00:00", "seconds": {}})
    run.append_history(make_line(1, validated=False))
    facts = {"dataset": "digits", "recipe": "fast", "split": "test", "epoch": 1, "test_sha256": "0" * 64}
    measured = {
        **facts,
        **metrics.measure(logits, logits, labels, classes),
        **analysis.scores(probabilities, labels, classes),
        "calibration": {
            **metrics.calibrate(logits[:0], labels[:0]),
            **metrics.calibration_error(logits, labels, 1.0),
        },
    }
    run.write("metrics.json", measured)
    run.write("analysis.json", analysis.analyse(probabilities, labels, classes, measured["most_confused"]))
    predictions.write(run, probabilities, dataset)
    return run, dataset


@pytest.fixture(scope="module")
def large_run(tmp_path_factory) -> Run:
    """A hundred classes with long names, drawn and on a page."""
    classes = [f"<b>aquarium_fish_{number}</b>" for number in range(100)]
    run, dataset = make_run(tmp_path_factory.mktemp("large"), classes, 400)
    visualize.visualize(run, dataset)
    report.write(run, dataset)
    return run


def test_a_hundred_classes_are_all_there_escaped_and_under_five_megabytes(large_run):
    tables, _ = read(large_run)
    assert [row[0] for row in tables["per-class"][1:]] == [f"<b>aquarium_fish_{number}</b>" for number in range(100)]
    assert "<b>aquarium" not in (large_run.path / "report.html").read_text(encoding="utf-8")
    assert (large_run.path / "report.html").stat().st_size < 5e6


def test_two_classes_without_mistakes_are_a_page(tmp_path):
    run, dataset = make_run(tmp_path, ["no", "yes"], 40)
    labels = dataset.test.labels.numpy()
    right = np.eye(2)[labels] * 0.8 + 0.1
    logits = np.log(right).astype(np.float32)
    run.write("metrics.json", {**run.metrics, **metrics.measure(logits, logits, labels, ["no", "yes"])})
    run.write("analysis.json", analysis.analyse(right, labels, ["no", "yes"], []))
    report.write(run, dataset)
    tables, text = read(run)
    assert "No image is misclassified." in text
    assert len(tables["per-class"]) == 3
    assert "No image was held out to fit a temperature" in text


def without(run: Run, path: Path, *names: str) -> Run:
    """A copy of the run's directory without some of its files."""
    shutil.copytree(run.path, path, ignore=lambda _, found: set(found) & {*names, "report.html"})
    return Run(path)


def test_what_is_missing_is_left_out(corrupted_run, digits, tmp_path):
    bare = without(corrupted_run, tmp_path / "bare", "corruptions.json", "analysis.json", "saliency.npz")
    report.write(bare, digits)
    tables, text = read(bare)
    assert "corruptions" not in tables
    assert "Suspected labels" not in text
    assert percent(bare.read("metrics.json")["accuracy"]) in text
    trained = without(
        corrupted_run, tmp_path / "trained", "corruptions.json", "analysis.json", "metrics.json", "figures"
    )
    trained.update(status="failed", error="the loss is not finite at epoch 2, step 1: lower --lr", note="Not CIFAR-10.")
    report.write(trained, digits)
    tables, text = read(trained)
    assert "per-class" not in tables
    assert "This run has not been evaluated: invoke evaluate --run trained measures it." in text
    assert "broken off by an error: the loss is not finite at epoch 2, step 1: lower --lr" in text
    assert "Not CIFAR-10." in text


def a_row_short(content: dict) -> None:
    content["confusion_matrix"].pop()


def a_curve_short(content: dict) -> None:
    del content["precision_recall"]["7"]


def beyond_the_split(content: dict) -> None:
    content["suspected_labels"] = [{**content["confident_mistakes"][0], "index": 360, "log_odds": 9.0}]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("metrics.json", a_row_short, "metrics.json is damaged: it contradicts itself"),
        ("analysis.json", a_curve_short, "analysis.json is damaged: it does not fit metrics.json"),
        ("analysis.json", beyond_the_split, "analysis.json is damaged: it names pictures that are not in the test"),
    ],
)
def test_files_that_contradict_each_other_are_named(corrupted_run, digits, tmp_path, name, change, sentence):
    run = without(corrupted_run, tmp_path / "run")
    content = run.read(name)
    change(content)
    run.write(name, content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        report.write(run, digits)


def test_a_run_of_before_the_analysis_is_a_page(corrupted_run, digits, tmp_path):
    old = without(corrupted_run, tmp_path / "old", "corruptions.json", "analysis.json", "saliency.npz")
    metrics = old.read("metrics.json")
    for key in ("average_precision", "selective", "test_sha256", "epoch"):
        del metrics[key]
    for key in ("threshold", "threshold_share"):
        del metrics["calibration"][key]
    old.write("metrics.json", metrics)
    old.write("run.json", {"status": "completed", "start": "2026-01-01T00:00:00+00:00", "seconds": {}})
    report.write(old, digits)
    tables, text = read(old)
    assert tables["per-class"][0] == ["class", "precision", "recall", "F1", "images"]
    assert "Answered at" not in text


def opened(browser, run: Run, width: int, mode: str):
    """The page from disk, at that width in pixels, light or dark; leaves behind what the browser has logged so far."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((run.path / "report.html").as_uri())


def column(browser, table: str, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(r => r.cells[arguments[1]].innerText)"
    )
    return browser.execute_script(script, table, number)


def test_the_page_opens_from_disk_without_network_or_error_and_sorts(browser, corrupted_run):
    opened(browser, corrupted_run, 1280, "light")
    images = browser.find_elements("css selector", "img")
    assert len(images) > 30
    assert all(image.get_property("complete") and image.get_property("naturalWidth") for image in images)
    names = column(browser, "per-class", 0)
    head = browser.find_elements("css selector", "#per-class th button")[1]
    orders = []
    for expected in ("ascending", "descending"):
        head.click()
        assert head.find_element("xpath", "..").get_attribute("aria-sort") == expected
        orders.append([float(text[:-1]) for text in column(browser, "per-class", 1)])
    assert orders[0] == sorted(orders[0])
    assert orders[1] == sorted(orders[0], reverse=True)
    assert sorted(column(browser, "per-class", 0)) == sorted(names)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in sent} == {"file", "data"}


CUT = """
const elements = document.querySelectorAll("h1, h2, h3, p, nav a, table, li, .tile *, .views img, summary");
const isSeen = element => !element.closest("details:not([open]) > :not(summary), .scroll") && element.offsetParent;
return [...elements].filter(isSeen).filter(element => {
  const box = element.getBoundingClientRect();
  return box.left < 0 || box.right > innerWidth || element.scrollWidth > element.clientWidth && element.clientWidth;
}).map(element => element.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_nothing_is_cut_and_text_stands_out(browser, corrupted_run, large_run, width, mode):
    for run in (corrupted_run, large_run):
        opened(browser, run, width, mode)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(CUT) == []
        script = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        text, page = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in browser.execute_script(script))
        assert (text < 60 and page > 240) if mode == "light" else (text > 200 and page < 40)


def test_it_is_printed_in_dark_letters_without_what_only_a_screen_needs(browser, corrupted_run):
    opened(browser, corrupted_run, 1280, "dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element("css selector", "nav").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

"""The JSON files of a run directory: the keys that the program reads, and the checks when they are read.

Fractions are 0..1 and durations are in seconds. A field that may be missing in a file, because an earlier version did
not write it, has the default None. Keys without a field are kept, as attributes too.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, Strict, ValidationError, model_validator


def _is_time(text: str) -> str:
    try:
        datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ValueError("should be a time in ISO 8601") from None
    return text


def _is_unicode(text: str) -> str:
    """Raise ValueError if the text has lone surrogates, which can neither be printed nor drawn."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has characters that are not valid Unicode")
    return text


Status = Literal["running", "completed", "interrupted", "failed", "killed"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(gt=-1e100, lt=1e100)]  # larger ones cannot be plotted
Count = Annotated[int, Field(ge=0, lt=2**53)]  # exact as a float too
Text = Annotated[str, AfterValidator(_is_unicode)]
RawText = str  # may have lone surrogates: a command line can contain a file name in any encoding
Time = Annotated[str, AfterValidator(_is_time)]  # local, with its offset
Interval = Annotated[tuple[Fraction, Fraction], Strict(False)]  # a list in the file


class Record(BaseModel):
    """A part of a JSON file: immutable, without type conversions (true is not 1, "3" is not 3), NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class LayerRecord(Record):
    name: Text
    kind: Text  # its class, such as Conv2d
    output_shape: list[Count]  # for one image, without the batch dimension
    parameters: Count
    multiply_adds: Count  # for one image


class ModelRecord(Record):
    name: Text
    parameters: Count
    multiply_adds: Count  # for one image
    layers: list[LayerRecord]


class DatasetRecord(Record):
    name: Text
    train_sha256: Text  # of images and labels
    classes: list[Text]  # in the order of the labels


class RunRecord(Record):
    """run.json: the state of a run, and what made it."""

    status: Status
    start: Time
    end: Time | None = None
    seconds: dict[Text, Number]  # by stage: data, train, evaluate, ...
    command: list[RawText] | None = None
    commit: Text | None = None
    dirty: bool | None = None  # whether the code differed from the commit
    versions: dict[Text, Text] | None = None
    platform: Text | None = None
    device: Text | None = None  # cpu, cuda or mps
    hardware: Text | None = None  # model of the processor or GPU
    precision: Text | None = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    processes: Count | None = None
    seed: int | None = None
    dataset: DatasetRecord | None = None
    model: ModelRecord | None = None
    note: RawText | None = None  # what the user should know, such as a dataset that was replaced
    error: RawText | None = None
    resumed: list[Record] | None = None  # time, epoch (from 1) and steps of it that were done
    seconds_before_resuming: dict[Text, Number] | None = None

    @property
    def total_seconds(self) -> float:
        """The seconds of a whole run, without the corruptions, which it does not measure by itself."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != "corruptions")


class EpochRecord(Record):
    """A line of history.jsonl: one epoch of training. Validation is null without a validation split."""

    epoch: Count  # from 1
    image_size: Count  # in pixels; smaller in the first epochs with progressive resizing
    images: Count | None = None  # that the epoch trained on
    lr: Number  # of the first step
    train_loss: Number
    train_accuracy: Fraction
    images_per_second: Number
    seconds: Number
    val_loss: Number | None
    val_accuracy: Fraction | None


class History(RootModel[list[EpochRecord]]):
    """history.jsonl: all epochs, first to last."""

    @model_validator(mode="after")
    def _epochs_are_in_order(self) -> "History":
        if [line.epoch for line in self.root] != list(range(1, len(self.root) + 1)):
            raise ValueError("its epochs are not 1, 2, 3 and so on")
        if len({value is None for line in self.root for value in (line.val_loss, line.val_accuracy)}) > 1:
            raise ValueError("some of its epochs have no validation")
        return self


class Scores(Record):
    precision: Fraction
    recall: Fraction
    f1: Fraction


class ClassScores(Scores):
    support: Count  # images of the class


class Confusion(Record):
    true: Text
    predicted: Text
    count: Count


class Selective(Record):
    """Selective classification: only the images with the highest confidence are answered."""

    area_under_risk_coverage: Fraction
    coverage_at_99_accuracy: Fraction  # largest fraction that is answered with 99% accuracy


class Bin(Record):
    low: Fraction  # lower end of an interval of confidence
    count: Count
    confidence: Fraction | None  # mean; null without images
    accuracy: Fraction | None


class Reliability(Record):
    expected_calibration_error: Fraction
    negative_log_likelihood: Number
    bins: list[Bin] = Field(min_length=1)  # of equal width, over 0..1


class Calibration(Record):
    """Temperature scaling, fitted on the validation split, and reliability on the test split."""

    temperature: Annotated[float, Field(gt=0, lt=1e100)]  # logits are divided by it
    threshold: Fraction | None = None  # confidence below which an image is probably of no class
    threshold_share: Fraction | None = None  # fraction of the validation images that are below it
    fitted_on: Count  # validation images
    before: Reliability
    after: Reliability


class Metrics(Record):
    """metrics.json: the evaluation of a run on the test split. The suffix _tta means test-time augmentation."""

    dataset: Text
    recipe: Text
    split: Text
    epoch: Count | None = None  # of the evaluated weights
    test_sha256: Text | None = None  # of images and labels
    n: Annotated[int, Field(ge=1, lt=2**53)]  # test images
    accuracy: Fraction
    interval_95: Interval  # Wilson's, of the accuracy
    accuracy_tta: Fraction
    interval_95_tta: Interval
    top5_accuracy: Fraction | None = None  # with more than ten classes
    top5_accuracy_tta: Fraction | None = None
    loss: Number  # cross-entropy
    per_class: dict[Text, ClassScores]  # in the order of the labels
    macro_average: Scores
    weighted_average: Scores | None = None
    most_confused: list[Confusion]  # most frequent first
    confusion_matrix: list[list[Count]]  # rows: true class; columns: predicted class
    average_precision: dict[Text, Fraction | None] | None = None  # null for a class without images
    selective: Selective | None = None
    calibration: Calibration

    @property
    def measured_classes(self) -> dict[str, ClassScores]:
        """The scores of the classes that have test images."""
        return {name: scores for name, scores in self.per_class.items() if scores.support}

    def can_be_of(self, test_sha256: str) -> bool:
        """Say whether they may have been measured on these test images; earlier versions did not note which."""
        return self.test_sha256 in (None, test_sha256)

    @model_validator(mode="after")
    def _parts_agree(self) -> "Metrics":
        matrix, classes = self.confusion_matrix, self.per_class
        if [len(row) for row in matrix] != [len(classes)] * len(classes):
            raise ValueError("its confusion_matrix does not have a row and a column for each class")
        if sum(map(sum, matrix)) != self.n:
            raise ValueError("its confusion_matrix does not sum to n")
        correct = sum(row[index] for index, row in enumerate(matrix))
        if abs(correct - self.accuracy * self.n) >= 0.5:
            raise ValueError("its confusion_matrix contradicts its accuracy")
        if self.average_precision is not None and self.average_precision.keys() != classes.keys():
            raise ValueError("its average_precision does not have the same classes as its per_class")
        bins = (*self.calibration.before.bins, *self.calibration.after.bins)
        if any(part.count and None in (part.confidence, part.accuracy) for part in bins):
            raise ValueError("its calibration has bins without confidence or accuracy")
        return self


class ImageRecord(Record):
    index: Count  # in the test split
    file: RawText | None = None  # of a folder of images: its path, relative to the folder
    true: Text
    predicted: Text
    confidence: Fraction  # probability of the predicted class
    true_probability: Fraction


class ConfusedPair(Confusion):
    pictures: list[ImageRecord]  # most confident first


class PrecisionRecall(Record):
    recall: list[Fraction] = Field(min_length=1)
    precision: list[Fraction]

    @model_validator(mode="after")
    def _lengths_agree(self) -> "PrecisionRecall":
        if len(self.recall) != len(self.precision):
            raise ValueError("should be a curve: two lists of one length")
        return self


class Analysis(Record):
    """analysis.json: mistakes, potential label errors and precision-recall curves on the test split."""

    confused_pairs: list[ConfusedPair]
    confident_mistakes: list[ImageRecord]  # most confident first
    suspected_labels: list[ImageRecord]  # potential label errors, most likely first
    precision_recall: dict[Text, PrecisionRecall]  # by class, one against the rest


class CorruptionScores(Record):
    accuracy: Fraction
    expected_calibration_error: Fraction


class Corruptions(Record):
    """corruptions.json: robustness to common corruptions of the test images."""

    dataset: Text | None = None
    n: Count  # test images
    clean: CorruptionScores
    mean: CorruptionScores  # over all corruptions and severities
    corruptions: dict[Text, list[CorruptionScores]]  # by corruption, mildest first

    @model_validator(mode="after")
    def _is_a_table(self) -> "Corruptions":
        lengths = {len(rows) for rows in self.corruptions.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("its corruptions do not all have the same severities")
        return self


class Spread(Record):
    mean: Number
    standard_deviation: Number  # of the sample
    interval_95: Annotated[tuple[Number, Number], Strict(False)] | None = None  # of the mean


class Summary(Record):
    """summary.json: a group of runs that differ only in the seed (--seeds)."""

    status: Status
    start: Time | None = None
    end: Time | None = None
    note: RawText | None = None
    given: dict[str, Any] | None = None  # the settings before --minutes was planned
    config: dict[str, Any]  # of the first seed
    runs: list[Record] | None = None  # seed, directory and main metrics of each, when all are done
    figures: dict[Text, Spread] | None = None  # by metric


RECORDS: dict[str, type[BaseModel]] = {
    "run.json": RunRecord,
    "history.jsonl": History,
    "metrics.json": Metrics,
    "analysis.json": Analysis,
    "corruptions.json": Corruptions,
    "summary.json": Summary,
}
_WORDINGS = {  # of pydantic's error types whose own messages name Python classes
    "missing": "is missing",
    **dict.fromkeys(("model_type", "dict_type"), "should be a JSON object"),
    **dict.fromkeys(("list_type", "tuple_type"), "should be a list"),
    "too_long": "should be a shorter list",
    "too_short": "should not be an empty list",
    "string_type": "should be text",
}


def parse(file_name: str, content: Any) -> Any:
    """Check the parsed JSON content of the file of that name and return it as its model in RECORDS.

    Raises ValueError with one short sentence that names the first wrong place, in dots.
    """
    try:
        return RECORDS[file_name].model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    problem = _WORDINGS.get(first["type"]) or first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise ValueError(f"{place} {problem}".strip())

import pytest

from cifar import console
from cifar.errors import UsageError, UserError

RECORD = {
    "epoch": 1,
    "image_size": 32,
    "train_loss": 0.5,
    "train_accuracy": 0.871,
    "val_loss": 0.4,
    "val_accuracy": 0.9123,
    "images_per_second": 1034.4,
    "seconds": 43.51,
}


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "printed"),
    [
        (lambda: None, 0, ""),
        (raising(UserError("mend [this]")), 1, "error: mend [this]\n"),
        (raising(UsageError("what?")), 2, "error: what?\n"),
        (raising(KeyboardInterrupt()), 130, "error: interrupted\n"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(action, code, printed, capsys):
    assert console.exit_code(action) == code
    assert capsys.readouterr().err == printed


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.exit_code(lambda: 1 / 0)


def test_a_terminal_shows_the_training_live_and_keeps_a_line_for_each_epoch(terminal):
    with console.TrainingDisplay([4, 4], [1.0, 1.0]) as display:
        display.step(1, 3, 0.4321, 0.871, 1034.4)
        display.progress.refresh()
        display.end_epoch(RECORD, best=True)
    written = terminal.getvalue()
    for part in ("epoch 1/2", "batch 3/4", "loss 0.432", "acc 87.1%", "1,034 images/s", "91.23%"):
        assert part in written


def test_a_terminal_shows_how_much_of_a_download_has_come(terminal):
    with console.download_bar("archive.tar.gz", 1000, 400) as show:
        show(500)
    written = terminal.getvalue()
    assert "archive.tar.gz" in written
    assert "400/1.0 kB" in written or "0.4/1.0 kB" in written
    assert "500/1.0 kB" in written or "0.5/1.0 kB" in written


def test_without_a_terminal_a_download_is_one_plain_line(capsys):
    for there in (0, 60_000_000):
        with console.download_bar("archive.tar.gz", 170_000_000, there) as show:
            show(there + 500)
    assert capsys.readouterr().out.splitlines() == [
        "downloading archive.tar.gz, 170 MB",
        "downloading archive.tar.gz, 170 MB, of which 60 are there",
    ]


def test_without_a_terminal_an_epoch_is_one_plain_line(capsys):
    with console.TrainingDisplay([22] * 11, [1.0] * 11) as display:
        display.step(1, 22, 0.5, 0.871, 1034.4)
        display.end_epoch(RECORD, best=True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert len(printed.rstrip()) <= 80
    assert "\x1b" not in printed
    for part in ("epoch  1/11", "loss 0.500 val 0.400", "accuracy 87.1% val 91.23%*", "1,034/s"):
        assert part in printed


def test_an_epoch_without_validation_has_no_validation_in_its_line(capsys):
    with console.TrainingDisplay([1, 1], [1.0, 1.0]) as display:
        display.end_epoch({**RECORD, "val_loss": None, "val_accuracy": None}, best=True)
    assert "val" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "costs", "left"),
    [([10, 5], [1.0, 1.0], "0:30"), ([10, 10], [1.0, 3.0], "3:00")],  # half the steps; three times the cost
)
def test_the_time_left_counts_each_epochs_steps_at_their_cost(steps, costs, left, monkeypatch, capsys):
    clock = iter([0.0, 0.0, 60.0, 60.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock, 60.0))
    with console.TrainingDisplay(steps, costs) as display:
        display.step(1, 10, 0.5, 0.5, 100.0)
        display.end_epoch(RECORD, best=False)
    assert capsys.readouterr().out.strip().endswith(f" {left} left")

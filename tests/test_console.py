"""What the terminal and a pipe show, exit codes, Ctrl-C and SIGTERM, and the wording of errors."""

import errno
import hashlib
import io
import os
import re
import resource
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from cifar import console, errors
from cifar.errors import UserError
from cifar.records import EpochRecord
from commands import run, start
from handmade import make_line

EPOCH = EpochRecord(**make_line(1, train_loss=0.5, train_accuracy=0.871, val_loss=0.4, val_accuracy=0.9123))


def raising(error):
    def action():
        raise error

    return action


ADVICE = "in training, a smaller --batch-size needs less\n"
OUT_OF_MEMORY = f"error: out of memory: close other programs or raise the limit; {ADVICE}"
GPU_OUT_OF_MEMORY = f"error: the GPU is out of memory: close other programs on it; {ADVICE}"
DISK_IS_FULL = "error: the disk is full (writing standard output or a temporary file): make room\n"


@pytest.mark.parametrize(
    ("action", "code", "printed"),
    [
        (raising(UserError("fix [this]\x1b[31m\n")), 1, "error: fix [this]\\x1b[31m\\n\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "interrupted\n"),
        (lambda: Path("/proc/none/file").read_text(), 1, "error: /proc/none/file: No such file or directory\n"),
        (raising(OSError(errno.ENOSPC, "No space left on device")), 1, DISK_IS_FULL),
        (raising(OSError("cannot identify\nimage")), 1, "error: OSError: cannot identify\n"),
        (raising(MemoryError()), 1, OUT_OF_MEMORY),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")), 1, GPU_OUT_OF_MEMORY),
        (lambda: __import__("torch").empty(2**50), 1, OUT_OF_MEMORY),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(action, code, printed, capsys):
    assert console.exit_code(action) == code
    assert capsys.readouterr().err == printed


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.exit_code(lambda: 1 / 0)


def test_messages_are_one_line_whatever_is_in_them(capsys):
    console.say("[bold]é💥\udcff\r\n" + "x" * 300)
    assert capsys.readouterr().out == "[bold]é💥\\udcff\\r\\n" + "x" * 300 + "\n"


def test_a_terminal_breaks_long_messages_between_words_but_neither_commands_nor_paths(terminal, monkeypatch):
    monkeypatch.setattr(console, "err", console.out)
    console.out.width = 40
    console.say("this is [a] long sentence in which no word is cut in two; resume with `python main.py --resume x`")
    console.error("cannot read /a/very/long/path/that/is/wider-than-the-terminal.png")
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines() == [
        "this is [a] long sentence in which no",
        "word is cut in two; resume with",
        "`python main.py --resume x`",
        "error: cannot read",
        "/a/very/long/path/that/is/wider-than-the-terminal.png",
    ]


def test_a_banner_shows_a_sentence_and_nothing_without_one(capsys):
    console.banner(None)
    assert capsys.readouterr().out == ""
    console.banner("this is [not] CIFAR-10")
    shown = capsys.readouterr().out
    assert "this is [not] CIFAR-10" in shown
    assert max(map(len, shown.splitlines())) == 80


LOGGED = """
import sys
from pathlib import Path
from cifar import console
console.say("before [the] log; " + "long " * 40)
console.log_to(Path(sys.argv[1]))
with console.counting_bar("images", 2) as advance:
    advance(1)
    console.say("beside a bar")
console.log_to(Path(sys.argv[2]))
console.out.print(console.table("scores", {"class": ["cat"], "F1": ["90%"]}))
console.error("it \x1b[31m failed")
console.say("last")
console.log_to(Path("/no/such/folder"))
console.say("lost")
"""


def test_a_log_has_what_was_printed_also_before_it_without_control_codes(tmp_path):
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}
    code, out, _ = run("-c", LOGGED, str(tmp_path / "first.txt"), str(tmp_path / "second.txt"), env=environment)
    assert (code, "\x1b[" in out) == (0, True)  # the bar
    first, second = ((tmp_path / name).read_text() for name in ("first.txt", "second.txt"))
    assert " ".join(first.split()) == f"before [the] log; {'long ' * 40}beside a bar"
    assert second.startswith("  scores")
    assert second.splitlines()[-3:] == ["cat   │ 90%", "error: it \\x1b[31m failed", "last"]


def test_a_pipe_shows_all_columns_of_a_table(capsys):
    wide = {f"column {n}": ["x" * 40] for n in range(20)}
    console.out.print(console.table("all", wide))
    printed = capsys.readouterr().out
    assert all(name in printed for name in wide)
    assert ("x" * 40 + " │ ") * 19 in printed


@pytest.mark.parametrize(("width", "left_out"), [(34, "status, 字"), (35, "字"), (57, "字"), (58, None)])
def test_a_terminal_shows_the_columns_that_fit(terminal, width, left_out):
    console.out.width = width  # they take 13 + 3 + 8 + 3 + 8, and 3 + 20
    status = [Text("damaged:\nrun.json", style="red"), "ok"]
    columns = {"run": ["first", "the\x1bsecond"], "accuracy": ["93.2%", "9.1%"], "status": status}
    table = console.table("some", {**columns, "字": ["字" * 10, ""]})
    assert (table.caption and table.caption.plain) == (left_out and f"too narrow to show: {left_out}")
    console.out.print(table)
    lines = terminal.getvalue().splitlines()
    assert any("the\\x1bsecond" in line and "   9.1%" in line for line in lines)


def test_a_terminal_shows_training_live_and_keeps_a_line_for_each_epoch(terminal):
    with console.TrainingProgress([4, 4], [32, 32]) as progress:
        progress.step(1, 3, 0.4321, 0.871, 1034.4)
        assert not progress.is_due()
        progress.refresh()
        progress.end_epoch(EPOCH, is_best=True)
    written = terminal.getvalue()
    for part in ("epoch 1/2", "3/4", "loss 0.432", "acc 87.1%", "1,034 img/s", "91.23%"):
        assert part in written


def test_how_long_training_will_take_is_said_after_its_second_step(monkeypatch, capsys):
    clock = iter([0.0, 9.0, 11.0, 30.0])  # started, and after three steps, of which the first takes longer
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    thread_clock = iter([8.0, 9.5])
    monkeypatch.setattr(console.time, "thread_time", lambda: next(thread_clock))
    with console.TrainingProgress([10, 10], [16, 32], "takes {:.0f} s, {:.0%} on a core".format) as progress:
        for step in (1, 2, 3):
            progress.step(1, step, 0.5, 0.5, 10.0)
    assert capsys.readouterr().out == "takes 100 s, 75% on a core\n"  # 10 steps of 2 seconds, and 10 of 8


def test_a_pipe_shows_one_line_for_each_epoch(capsys):
    with console.TrainingProgress([22] * 11, [32] * 11) as progress:
        progress.step(1, 22, 0.5, 0.871, 1034.4)
        progress.end_epoch(EPOCH, is_best=True)
        progress.end_epoch(EPOCH.model_copy(update={"val_loss": None, "val_accuracy": None}), is_best=True)
    line, without_validation = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch  1/11  loss 0.500 val 0.400  acc 87.1% val 91.23%* 100 img/s ")
    assert len(line) <= 80
    assert "val" not in without_validation


@pytest.mark.parametrize(
    ("steps", "image_sizes", "resumed", "left"),
    [
        ([10, 5], [32, 32], None, "0:30"),  # half the steps are left
        ([10, 10], [16, 32], None, "4:00"),  # at four times the cost
        ([10, 10], [32, 32], (1, 5), "2:00"),  # five steps in 60 seconds, ten are left
    ],
)
def test_the_time_left_counts_each_step_of_this_process_at_its_cost(
    steps, image_sizes, resumed, left, monkeypatch, capsys
):
    clock = iter([0.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock, 60.0))
    with console.TrainingProgress(steps, image_sizes) as progress:
        if resumed:
            progress.resume(*resumed)
        progress.end_epoch(EPOCH, is_best=False)
        progress.resume(2, 0)
    *before, epoch, again = capsys.readouterr().out.splitlines()
    assert before == (["resuming at epoch 1, step 5 of 10"] if resumed else [])
    assert epoch.endswith(f" {left} left")
    assert again == "resuming at epoch 2"


def test_a_terminal_shows_how_much_of_a_download_has_arrived(terminal):
    with console.download_bar("archive[1].tar.gz", 1000, 400) as show:
        show(500)
    written = terminal.getvalue()
    assert "archive[1].tar.gz" in written
    assert re.search(r"(400|0\.4)/1\.0 kB", written)
    assert re.search(r"(500|0\.5)/1\.0 kB", written)


def test_a_pipe_shows_a_download_as_one_line_and_no_counting_bar(capsys):
    for present in (0, 60_000_000):
        with console.download_bar("archive.tar.gz", 170_000_000, present) as show, console.counting_bar("x", 3) as add:
            show(present + 500)
            add(1)
    assert capsys.readouterr().out.splitlines() == [
        "downloading archive.tar.gz, 170 MB",
        "downloading archive.tar.gz, 170 MB (60 MB already present)",
    ]


def test_a_pipe_is_told_how_far_a_long_job_is(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", iter([0, 4, 6, 6, 9, 12, 12]).__next__)
    with console.counting_bar("evaluating", 8) as add:
        for count in (1, 1, 2, 3):
            add(count)
    assert capsys.readouterr().out.splitlines() == ["evaluating: 25%", "evaluating: 88%"]


def test_the_first_signal_is_deferred_and_announced_and_the_second_acts(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with console.deferred_interrupt() as received:
        assert received() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == signal.SIGINT
        with pytest.raises(console.Interrupted) as second:
            os.kill(os.getpid(), signal.SIGTERM)
        assert second.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().out == "finishing this step, then saving; press Ctrl-C again to quit now\n"


def test_what_fails_after_a_signal_since_another_process_has_ended_counts_as_the_interruption():
    def fail(*signals: int) -> None:
        with console.deferred_interrupt():
            for number in signals:
                os.kill(os.getpid(), number)
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(console.Interrupted):
        fail(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="closed by peer"):
        fail()


IN_A_TERMINAL = """
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # which the session's first process gets its signals from
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
from cifar import console

def act():
    with console.deferred_interrupt() as received:
        console.say("ready")
        while not received():
            time.sleep(0.05)
        console.say("a terminal that is closed cannot show this")
        open(sys.argv[1], "w").write("saved")
        raise console.Interrupted(received())

sys.exit(console.exit_code(act))
"""

AFTER_THE_TERMINAL = """
import os, sys, time
from cifar import console
console.say("ready")
while True:
    try:
        os.write(1, b".")
    except OSError:
        break
    time.sleep(0.05)
with console.counting_bar("training", 2) as advance:
    console.say("not shown")
    advance(1)
open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize(
    ("program", "variables", "code"),
    [
        (IN_A_TERMINAL, {}, 128 + signal.SIGHUP),
        (AFTER_THE_TERMINAL, {"FORCE_COLOR": "1"}, 0),  # rich draws its bars though the terminal is gone
    ],
    ids=["by the signal", "by a write"],
)
def test_a_program_that_learns_that_its_terminal_is_closed_saves_and_ends(tmp_path, program, variables, code):
    outer, inner = os.openpty()
    options = {**dict.fromkeys(("stdin", "stdout", "stderr"), inner), "env": os.environ | variables}
    with start("-c", program, str(tmp_path / "made"), start_new_session=True, **options) as process:
        os.close(inner)
        try:
            assert os.read(outer, 100).strip().startswith(b"ready")
            os.close(outer)
            assert process.wait(30) == code
        finally:
            process.kill()
    assert (tmp_path / "made").read_text() == "saved"


@pytest.mark.parametrize("presses", [1, 2])
def test_signals_are_announced_and_counted_during_one_long_operation(presses, monkeypatch):
    said = []
    monkeypatch.setattr(console, "say", lambda message: said.append(time.monotonic()))
    with console.deferred_interrupt(), pytest.raises(console.Interrupted) if presses == 2 else nullcontext():
        for press in range(presses):
            threading.Timer(0.1 + 0.1 * press, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # most of a second in which Python calls no handler
        finally:
            ended = time.monotonic()
    assert len(said) == 1
    assert said[0] < ended


def test_a_signal_that_comes_while_a_finalizer_runs_is_not_lost():
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the handler raises here, and Python drops what __del__ raises

    def action():
        Finalized()
        time.sleep(5)

    started = time.monotonic()
    assert console.exit_code(action) == 143
    assert time.monotonic() - started < 4


def test_a_signal_that_this_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with console.deferred_interrupt() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ones_own_stream_need_not_be_a_terminals(monkeypatch):
    written: list[str] = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    monkeypatch.setattr(console, "out", console._Console())
    console.say("a" * 200)
    assert "".join(written) == "a" * 200 + "\n"


def test_text_that_stdout_cannot_encode_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(console, "out", Console(highlight=False))
    assert console.exit_code(lambda: console.say("é")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"


def exit_of(action: str, **options) -> tuple[int, str, str]:
    """Run an action in a process of its own; returns its exit code, output and errors."""
    return run(
        "-c", f"import os, sys; from cifar import console; sys.exit(console.exit_code(lambda: {action}))", **options
    )


def test_a_command_goes_on_when_nobody_reads_its_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    action = f"[console.say('x'), console.say('y'), open({str(tmp_path / 'done')!r}, 'w')]"
    code, _, err = exit_of(action, stdout=writer)
    os.close(writer)
    assert (code, err) == (0, "standard output is closed: continuing without it\n")
    assert (tmp_path / "done").exists()


def test_no_file_takes_the_number_of_a_closed_stream():
    close = lambda: [os.close(descriptor) for descriptor in (0, 2)]  # noqa: E731
    assert exit_of("print(open('main.py').fileno() > 2)", preexec_fn=close)[:2] == (0, "True\n")


@pytest.mark.parametrize(("columns", "kept"), [("1", None), ("abc", None), ("100", "100")])
def test_a_nonsensical_width_in_the_environment_is_ignored(columns, kept):
    printed = exit_of("print(os.environ.get('COLUMNS'))", env={**os.environ, "COLUMNS": columns})
    assert printed == (0, f"{kept}\n", "")


def test_a_limit_of_memory_that_is_too_low_is_one_sentence():
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (500_000_000, 500_000_000))  # noqa: E731
    assert exit_of("__import__('torch')", preexec_fn=limit) == (1, "", OUT_OF_MEMORY)


def test_errors_are_worded_in_one_line():
    assert errors.describe(ImportError("\n\nIMPORTANT: read\nmore")) == "ImportError: IMPORTANT: read"
    assert errors.first_line(ValueError()) == ""


def test_a_path_is_shown_from_the_working_directory_unless_that_is_longer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert errors.display_path(tmp_path / "runs" / "one") == os.path.join("runs", "one")
    assert errors.display_path("/etc/x") == "/etc/x"

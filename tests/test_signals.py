import os
import signal

import pytest

from cifar import signals


def test_the_first_signal_is_held_back_and_the_second_acts():
    before = signal.getsignal(signal.SIGTERM)
    with signals.held_back() as number:
        assert number() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert number() == signal.SIGTERM
        with pytest.raises(signals.Interrupted) as second:
            os.kill(os.getpid(), signal.SIGINT)
        assert second.value.number == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.held_back() as number:
            os.kill(os.getpid(), signal.SIGTERM)
            assert number() is None
    finally:
        signal.signal(signal.SIGTERM, before)

"""The list of callbacks: order of the hooks, and closing after an exception."""

import pytest

from rae_xla.train.callbacks import Callback, CallbackList


class Recorder(Callback):
    def __init__(self, name, calls, failure=None):
        self.name, self.calls, self.failure = name, calls, failure

    def on_train_start(self, trainer):
        self.calls.append(self.name)

    def close(self, error):
        self.calls.append((self.name, error))
        if self.failure is not None:
            raise self.failure


def test_hooks_run_in_order_and_closing_in_reverse():
    calls = []
    callbacks = CallbackList([Recorder("first", calls), Recorder("second", calls)])
    with callbacks.closing():
        callbacks.on_train_start(None)
    assert calls == ["first", "second", ("second", None), ("first", None)]


def test_a_failing_close_does_not_hide_the_exception_of_the_training(caplog):
    calls, original = [], RuntimeError("original")
    callbacks = CallbackList([Recorder("first", calls), Recorder("second", calls, OSError("disk"))])
    with pytest.raises(RuntimeError, match="original"), callbacks.closing():
        raise original
    assert calls == [("second", original), ("first", original)]
    assert "closing Recorder failed" in caplog.text


def test_a_failing_close_is_raised_after_a_successful_training():
    callbacks = CallbackList([Recorder("first", []), Recorder("second", [], OSError("disk"))])
    with pytest.raises(OSError, match="disk"), callbacks.closing():
        pass

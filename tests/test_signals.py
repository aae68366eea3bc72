"""SIGTERM and Ctrl-C: an exception, once, and in a launcher only after its workers have saved their state."""

import multiprocessing
import os
import signal
import time

import pytest

from teq.verbs import signals


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_at_once_does_not_stop_the_saving(stop):
    saved = False
    before = signal.getsignal(stop)
    with pytest.raises((signals.Terminated, KeyboardInterrupt)), signals.terminable():
        try:
            os.kill(os.getpid(), stop)
        finally:
            os.kill(os.getpid(), stop)
            os.kill(os.getpid(), signal.SIGTERM)
            saved = True
    assert saved and signal.getsignal(stop) is before


def work(working, state):
    """A worker whose state takes a while to save."""
    note = working / f"{os.getpid()}-0"
    with signals.terminable():
        working.mkdir()
        note.touch()
        try:
            time.sleep(60)
        finally:
            time.sleep(0.5)
            state.write_text("saved")
            note.unlink()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_is_stopped_when_its_workers_have_saved_their_state(tmp_path, stop):
    working, state = tmp_path / "working", tmp_path / "state"
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(working, state), daemon=True)
    worker.start()
    while not list(working.glob("*-0")):
        time.sleep(0.02)
    (working / f"{os.getppid()}-1").touch()  # as of another host, whose processes are not this one's
    with pytest.raises((signals.Terminated, KeyboardInterrupt)), signals.terminable(working):
        os.kill(os.getpid(), stop)
    assert state.read_text() == "saved"
    worker.join(10)

"""Stopping: heard at once, whatever the main thread does, and a pass that is given up leaves nothing behind."""

import hashlib
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from waiting import PATIENCE, until

from abi_py.config import LoraConfig
from abi_py.model import LoraModel
from abi_py.model.layers import attention
from abi_py.training.events import EvaluationEvent
from abi_py.training.interrupts import Interrupts
from abi_py.training.stop import SIGNALS, GracefulStop, PassWatch, Stopped
from abi_py.training.trainer import LlamaTrainer

signals = pytest.mark.skipif(os.name != "posix", reason="signals")


class StopAtCheck(GracefulStop):
    """Requested at the check of a number, counted over all passes, which is then given up however short it is."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def watch_pass(self):
        return CountedWatch(self)


class CountedWatch(PassWatch):
    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def __call__(self):
        self.stop.left -= 1
        if not self.stop.left:
            self.stop.request()
            raise Stopped


def adapted(model):
    model = LoraModel(model, LoraConfig(rank=2, dropout=0.2, target_modules=("q_proj", "down_proj"), seed=4))
    for name, w in model.weights.items():
        if name.endswith(".b"):
            w[...] = np.random.default_rng(len(name)).normal(0, 0.1, w.shape)
    return model


def whole_state(trainer):
    """Return all that must be the same: weights, moments, losses and counters."""
    clock = {"elapsed_ns", "train_ns", "checkpoints_saved", "data", "draws", "base_digest"}  # the last two: when saved
    state = {name: value for name, value in vars(trainer.state).items() if name not in clock}
    moments = {name: moment.tobytes() for name, moment in trainer.optimizer.moments.items()}
    return trainer.model.parameters.weights_flat.tobytes(), moments, trainer.loss_history, state, trainer.model.draws


@pytest.fixture
def long_passes(monkeypatch):
    """Passes that look for a stop between two layers; short ones do so at their end (tests/model/test_passes.py)."""
    monkeypatch.setattr("abi_py.model.stack.LONG", 0.0)


@pytest.mark.usefixtures("long_passes")
@pytest.mark.parametrize("lora", [False, True])
def test_a_pass_given_up_at_any_layer_changes_nothing(make_model, make_config, data, tmp_path, lora):
    """A check follows each of 4 branches and the head, forward and backward: 9 in each of 16 micro-batches."""
    make = (lambda **changes: adapted(make_model(**changes))) if lora else make_model
    whole = LlamaTrainer(make(), make_config())
    whole.fit(data)
    total = StopAtCheck(10**6)
    LlamaTrainer(make(), make_config()).fit(data, stop=total)
    checks = 10**6 - total.left
    assert checks == 9 * 16
    for number in [*range(1, 37, 1 if not lora else 5), checks // 2, checks]:
        config = make_config(checkpoint_path=str(tmp_path / f"{number}"))
        first = LlamaTrainer(make(), config)
        report = first.fit(data, stop=StopAtCheck(number))
        assert report.interrupted
        second = LlamaTrainer(make(), config)
        if report.checkpoint is not None:
            second.load_checkpoint(config.checkpoint_path)
            assert second.state.batch_position + 8 * second.state.epoch <= (number - 1) // 9
        second.fit(data)
        assert whole_state(second) == whole_state(whole), number
        first.fit(data)  # in memory, too, it goes on as if it had not been stopped
        assert whole_state(first) == whole_state(whole), number


def test_the_forward_pass_of_a_later_micro_batch_costs_only_itself(make_model, make_config, data):
    """Its window's gradients are whole; those of a backward pass that has begun are not, and the window is repeated."""
    for number, position in ((9 + 4, 1), (9 + 5, 0)):
        trainer = LlamaTrainer(make_model(), make_config())
        trainer.fit(data, stop=StopAtCheck(number))
        assert (trainer.state.batch_position, trainer.state.micro_step) == (position, position)


@pytest.mark.usefixtures("long_passes")
def test_a_window_of_an_older_checkpoint_is_repeated_too(make_model, make_config, data):
    """It does not say where the epoch's loss was."""
    trainer = LlamaTrainer(make_model(), make_config())
    trainer.fit(data, stop=StopAtCheck(9 * 4 + 1))  # in the second window
    trainer.state.window_opened_at = None
    before = trainer.state.epoch_loss - trainer.state.window_loss
    trainer.state.repeat_window()
    assert (trainer.state.batch_position, trainer.state.epoch_loss) == (3, before)


def test_an_exception_in_a_loop_of_the_users_own_leaves_a_clean_window(make_model, make_config, one_batch):
    """Ctrl-C in a notebook: what follows trains as if the window had not begun."""
    trainer, plain = (LlamaTrainer(make_model(), make_config(grad_accum_steps=2)) for _ in range(2))
    ids, labels = one_batch()
    trainer.train_step(ids, labels)
    original = trainer.model.stack.backward

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    trainer.model.stack.backward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train_step(labels, ids)
    trainer.model.stack.backward = original
    for each in (trainer, plain):
        each.train_step(ids, labels)
        each.train_step(labels, ids)
    assert whole_state(trainer) == whole_state(plain)


@pytest.mark.parametrize("place", ["update", "pass", "count"])
def test_ctrl_c_without_a_stop_tears_no_step(make_model, make_config, data, monkeypatch, place):
    """In the optimizer, after a pass, and between a step and its place in the data: what follows has the same bits."""
    first, whole = (LlamaTrainer(make_model(), make_config()) for _ in range(2))
    where, name = {
        "update": (first.optimizer, "update"),
        "pass": (first.model, "compute_loss"),
        "count": (first._step, "_tell"),
    }[place]
    original, calls = getattr(where, name), iter(range(100))

    def interrupted(*args, **given):
        result = original(*args, **given)
        if next(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(where, name, interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            first.fit(data)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        first.fit(data)
    finally:
        signal.signal(signal.SIGINT, handler)
    whole.fit(data)
    assert whole_state(first) == whole_state(whole)


def test_a_second_ctrl_c_is_not_put_off():
    interrupts, heard = Interrupts(), []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with interrupts.held(), interrupts.held():
            signal.raise_signal(signal.SIGINT)
            assert heard == []
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
            with interrupts.let_through():
                assert len(heard) == 2
                signal.raise_signal(signal.SIGINT)
                assert len(heard) == 3
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("long_passes")
def test_an_evaluation_is_given_up(make_model, make_config, data, record):
    config, sink = make_config(eval_interval=2, epochs=1), record()
    trainer = LlamaTrainer(make_model(), config, [sink])
    assert trainer.fit(data, data, stop=StopAtCheck(9 * 6 + 7)).interrupted
    assert (trainer.state.evaluation_due, trainer.state.batch_position) == (True, 6)
    assert not any(isinstance(event, EvaluationEvent) for event in sink.events)


def test_short_passes_are_finished(monkeypatch):
    monkeypatch.setattr("abi_py.training.stop.SHORT_SECONDS", 3600.0)
    stop = GracefulStop()
    check = stop.watch_pass()
    stop.request()
    check()
    stop.watch_pass()()
    assert not check.flag[0]


def test_a_pass_is_given_up_when_it_is_no_short_one_any_more(monkeypatch):
    """From another thread: the one that computes is inside of a kernel, which looks at the flag."""
    monkeypatch.setattr("abi_py.training.stop.SHORT_SECONDS", 0.05)
    stop = GracefulStop()
    check = stop.watch_pass()
    check()
    stop.request()
    assert until(lambda: check.flag[0])
    with pytest.raises(Stopped):
        check()
    later = stop.watch_pass()  # begun before the request was seen
    assert until(lambda: later.flag[0])


def test_attention_sees_the_flag_of_the_pass(make_model, one_batch, monkeypatch):
    seen = []
    for name in ("attention_forward", "attention_backward"):
        right = getattr(attention, name)
        spy = lambda *given, right=right: (seen.append(given[-2]), right(*given))  # noqa: E731
        monkeypatch.setattr(attention, name, spy)
    model, check = make_model(), PassWatch()
    model.compute_loss(*one_batch(), backward=True, check=check)
    assert len(seen) == 2 * model.config.num_layers
    assert all(flag is check.flag for flag in seen)


@signals
def test_a_signal_is_heard_while_the_main_thread_computes():
    """By another thread, while the main one is inside of a call that lets others run, as kernels do."""
    heard, tellers = threading.Event(), []

    def tell(text):
        tellers.append((threading.current_thread(), text))
        heard.set()

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with GracefulStop(tell) as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert until(lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000) and heard.is_set(), pause=0)
    ((thread, text),) = tellers
    assert thread is not threading.main_thread()
    assert "once more to stop at once" in text
    assert (stop.requested, stop.exit_code) == (True, 130)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


@signals
def test_who_listened_before_still_does():
    """An event loop: that of a notebook."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert until(lambda: stop.requested)
        assert os.read(reader, 8) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(before) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@signals
def test_nothing_is_left_open(monkeypatch):
    known = set(threading.enumerate())  # one of an earlier test may end meanwhile

    def left():
        handlers = [signal.getsignal(number) for number in SIGNALS]
        return len(os.listdir("/dev/fd")), len(set(threading.enumerate()) - known), handlers

    before = left()
    with GracefulStop() as stop:
        assert left() != before
    assert left() == before
    with pytest.raises(ZeroDivisionError), stop:
        raise ZeroDivisionError
    assert left() == before
    full = OSError(24, "Too many open files")
    monkeypatch.setattr("os.pipe", lambda: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="Too many"), GracefulStop():
        pass
    assert left() == before
    assert signal.set_wakeup_fd(-1) == -1


@signals
def test_a_signal_as_the_watch_ends_is_heard(monkeypatch):
    """The system no longer writes it, and the handlers of before are not back yet."""
    close = os.close

    def signalled(end):
        monkeypatch.setattr("os.close", close)
        signal.raise_signal(signal.SIGTERM)
        close(end)

    with GracefulStop() as stop:
        monkeypatch.setattr("os.close", signalled)
    assert stop.signal == signal.SIGTERM


FORKS = """
import os, signal, sys, time
from abi_py.training.stop import GracefulStop
with GracefulStop() as stop:
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(go, b"1")
            signal.pause()
        except KeyboardInterrupt:
            os._exit(7)
    os.read(ready, 1)
    os.kill(child, signal.SIGINT)  # not to this process
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.exit_code)
"""


@signals
def test_a_forked_child_has_signals_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split() == ["7", "False", "130"]


COMPUTES = """
import hashlib, sys
from abi_py.training.stop import GracefulStop
with GracefulStop(lambda text: print("heard", flush=True)):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # a quarter of an hour
"""


@signals
def test_a_second_signal_ends_a_process_that_computes():
    process = subprocess.Popen([sys.executable, "-c", COMPUTES], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "heard\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130
    process.stdout.close()

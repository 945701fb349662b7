"""`fit(progress=True)`: lines in a pipe, and in a notebook one that is replaced; nothing without it."""

import sys
import types

import pytest

from abi_py.training.progress import showing
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture
def notebook(monkeypatch):
    """An IPython with a kernel; returns what its displays showed, each with its first text and all later ones."""
    shown = []

    class Handle:
        def __init__(self, texts):
            self.texts = texts

        def update(self, content, raw):
            self.texts.append(content["text/plain"])

    def display(content, raw, display_id):
        assert raw
        assert display_id
        assert list(content) == ["text/plain"]
        shown.append([content["text/plain"]])
        return Handle(shown[-1])

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_lines_in_a_pipe_and_nothing_unasked(make_model, make_config, data, capsys):
    trainer = LlamaTrainer(make_model(), make_config())
    trainer.fit(data, data, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step 1/6")]
    assert sum("validation loss" in line for line in lines) == 1
    assert trainer.events.sinks == []
    LlamaTrainer(make_model(), make_config()).fit(data)
    assert capsys.readouterr().out == ""
    LlamaTrainer(make_model(), make_config()).train_epoch(data, progress=True)
    assert "step 3" in capsys.readouterr().out
    trainer = LlamaTrainer(make_model(), make_config(eval_interval=2))
    trainer.set_validation_data(data)
    trainer.train_epoch_with_validation(data, progress=True)
    out = capsys.readouterr().out
    assert "step 3" in out
    assert "validation loss" in out


def test_one_line_in_a_notebook(make_model, make_config, data, capsys, notebook):
    trainer = LlamaTrainer(make_model(), make_config(eval_interval=2))
    trainer.fit(data, data, progress=True)
    (texts,) = notebook  # one display, updated
    assert texts[0].startswith("step 1/6  epoch 1  loss ")
    assert texts[-1].startswith("step 6/6  epoch 2  loss ")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert all("validation loss" in line for line in out)
    trainer.config = trainer.config.replace(epochs=3)
    trainer.fit(data, progress=True)
    assert len(notebook) == 2  # another training, another line


def test_ipython_without_a_kernel_is_a_terminal(monkeypatch, make_model, make_config, data, capsys):
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", module)
    LlamaTrainer(make_model(), make_config()).fit(data, progress=True)
    assert "step 1/6" in capsys.readouterr().out


def test_a_long_compilation_is_told(monkeypatch, capsys, make_model, make_config):
    from numba.core import event
    from waiting import until

    monkeypatch.setattr("abi_py.training.progress.PATIENCE", 0.0)
    trainer = LlamaTrainer(make_model(), make_config())
    told = []
    with showing(trainer.events, True):
        sink = trainer.events.sinks[0]
        monkeypatch.setattr(sink, "say", told.append)
        with event.trigger_event("numba:compile", data={}), event.trigger_event("numba:compile", data={}):
            assert until(lambda: told)
    assert told == ["compiling kernels for this processor, once ..."]


def test_a_short_compilation_is_not_told(monkeypatch, capsys, make_model, make_config):
    from numba.core import event

    timers = []

    class Timer:
        def __init__(self, seconds, function):
            self.cancelled = False
            timers.append(self)

        def start(self):
            pass

        def cancel(self):
            self.cancelled = True

    monkeypatch.setattr("abi_py.training.progress.threading.Timer", Timer)
    with showing(LlamaTrainer(make_model(), make_config()).events, True):
        for _ in range(2):
            with event.trigger_event("numba:compile", data={}):
                with event.trigger_event("numba:compile", data={}):
                    pass
                assert [timer.cancelled for timer in timers[:-1]] == [True] * (len(timers) - 1)
                assert not timers[-1].cancelled
            assert timers[-1].cancelled
    assert len(timers) == 2


def test_each_epoch_of_ones_own_loop_has_its_total(make_model, make_config, data, capsys, record):
    trainer, sink = LlamaTrainer(make_model(), make_config()), record()
    trainer.add_sink(sink)
    shown = []
    for _ in range(3):
        trainer.train_epoch(data, progress=True)
        shown.append([line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")])
    assert shown[0] == ["1/6", "2/6", "3/6"]
    assert shown[1] == ["4/6", "5/6", "6/6"]
    assert shown[2] == ["7/9", "8/9", "9/9"]  # more than was planned
    assert len(sink.of("start")) == 1

"""Runs side by side: settings that differ, what may be compared, smoothing, and the picture."""

import itertools
import math
import sys

import pytest
import yaml
from recorded_events import a_step, an_evaluation, begin

from abi_py.errors import ConfigError
from abi_py.runs.comparing import Comparison, smoothed
from abi_py.runs.curves import Curve, Panel, draw
from abi_py.training.metrics import JsonlSink

MODEL = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "intermediate_dim": 8, "vocab_size": 257}


@pytest.fixture
def make(tmp_path):
    """Return a function that makes the directory of a run with these settings and losses."""

    def made(name, losses=(3.0, 2.0), bits=None, tokenizer=None, **sections):
        sink = JsonlSink(tmp_path / name / "metrics.jsonl")
        sink.handle(begin())
        for step in range(1, 11):
            sink.handle(a_step(step, 5.0 - 0.1 * step))
        for step, loss in zip(itertools.count(5, 5), losses):
            sink.handle(an_evaluation(step, loss, None if bits is None else bits + loss))
        sink.close()
        sections = {"model": MODEL, "training": {}, "data": {}} | sections
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(sections))
        if tokenizer is not None:
            (tmp_path / name / "tokenizer.json").write_text(tokenizer)
        return tmp_path / name

    return made


def test_only_what_differs_and_no_places(make):
    one = make("one", training={"learning_rate": 0.1, "checkpoint_path": "/a"}, data={"path": ["/t.txt"]})
    two = make("two", training={"learning_rate": 0.2, "checkpoint_path": "/b", "epochs": 10}, data={"path": ["/t.txt"]})
    found = Comparison([one, two]).differing()
    assert found[("training", "learning_rate")] == [0.1, 0.2]
    assert set(found) == {("training", "learning_rate")} | ({("training", "epochs")} if len(found) > 1 else set())
    three = make("three", training={"learning_rate": 0.1, "seed": 0})  # said, and the default: the same as not said
    assert ("training", "seed") not in Comparison([one, three]).differing()


def test_the_lowest_loss_wins_where_losses_compare(make):
    compared = Comparison([make("one", (3.0, 2.0)), make("two", (1.9, 2.1)), make("none", ())])
    assert compared.winner() == ("two", "validation loss", 1.9, 5)
    assert compared.notes() == []


def test_other_vocabularies_are_compared_by_bits_per_byte(make):
    one = make("one", (3.0, 2.0), bits=-0.5)
    two = make("two", (5.0, 4.0), bits=-2.75, model={**MODEL, "vocab_size": 4096}, tokenizer="{}")
    compared = Comparison([one, two])
    assert compared.obstacles() == ["vocabulary"]
    assert compared.winner() == ("two", "bits per byte", 1.25, 10)
    assert "bits per byte are" in compared.notes()[0]
    assert [panel.title for panel in compared.panels("step")[0]][1] == "validation, bits per byte"
    unknown = Comparison([one, make("three", tokenizer='{"other": 1}')])
    assert unknown.winner() is None
    assert any("not known of three" in note for note in unknown.notes())


def test_other_validation_data_have_no_winner(make):
    compared = Comparison([make("one", bits=1.0), make("two", bits=2.0, data={"path": ["/other.txt"]})])
    assert compared.obstacles() == ["validation data"]
    assert compared.winner() is None
    assert "abi-train eval" in compared.notes()[0]


@pytest.mark.parametrize(
    ("one", "two", "obstacles"),
    [
        ({"data": {"path": ["/a"], "valid_path": ["/v"]}}, {"data": {"path": ["/b"], "valid_path": ["/v"]}}, []),
        ({"data": {"path": ["/a"], "valid_path": ["/v"]}}, {"data": {"path": ["/a"]}}, ["validation data"]),
        ({"training": {"seed": 0}}, {"training": {"seed": 1}}, []),
        (
            {"training": {"seed": 0}, "chat": {"loss_on": "all"}},
            {"training": {"seed": 1}, "chat": {"loss_on": "all"}},
            ["validation data"],
        ),
        ({"chat": {"held_out": "last"}}, {"chat": {"held_out": "again"}}, ["validation data"]),
    ],
)
def test_what_validation_data_follow_from(make, one, two, obstacles):
    usual = {"data": {"path": ["/t"]}}
    assert Comparison([make("one", **{**usual, **one}), make("two", **{**usual, **two})]).obstacles() == obstacles


def test_what_follows_is_no_difference(make):
    one = make("one", model={**MODEL, "head_dim": None, "hidden_dim": 32, "num_heads": 2})
    two = make(
        "two",
        model={**MODEL, "head_dim": 16, "hidden_dim": 32, "num_heads": 2},
        base={"path": "/b", "digest": "0" * 64},
    )
    found = Comparison([one, two]).differing()
    assert ("model", "head_dim") not in found
    assert ("base", "path") in found
    assert ("base", "digest") not in found
    for name, end in (("three", 0.01), ("four", 0.05)):
        rates = {"learning_rate": 0.2, "min_learning_rate": end}
        other = make(name, training=rates)
        assert ("training", "min_learning_rate") in Comparison([one, other]).differing(), name


def test_runs_of_one_name_are_called_by_their_paths(make, tmp_path):
    assert Comparison([make("x/a"), make("y/a")]).names == [str(tmp_path / "x/a"), str(tmp_path / "y/a")]
    with pytest.raises(ConfigError, match="must be given once"):
        Comparison([make("z"), tmp_path / "x/../z"])


def test_smoothing():
    assert list(smoothed([1.0, 5.0, 2.0], 0)) == [1.0, 5.0, 2.0]
    assert list(smoothed([3.0] * 5, 2.0)) == pytest.approx([3.0] * 5)
    keep = math.exp(-1 / 4)
    assert list(smoothed([1.0, math.nan, 2.0], 4))[2] == pytest.approx((keep * 1 + 2) / (keep + 1))
    assert math.isnan(next(smoothed([math.nan], 1)))


def test_curves_over_steps_tokens_and_seconds(make):
    compared = Comparison([make("one")])
    for by, places in (("step", [5, 10]), ("tokens", [500, 1000]), ("seconds", [1.0, 2.0])):
        panels, _ = compared.panels(by)
        faint, smooth = panels[0].curves
        assert (faint.faint, smooth.faint, len(faint.x)) == (True, False, 10)
        assert panels[1].curves[0].x == pytest.approx(places)
        assert [panel.title for panel in panels] == ["training loss", "validation loss", "learning rate"]


def test_a_run_without_steps_has_no_curves(tmp_path):
    sink = JsonlSink(tmp_path / "a" / "metrics.jsonl")
    sink.handle(begin())
    sink.close()
    with pytest.raises(ConfigError, match="nothing to draw"):
        Comparison([tmp_path / "a"]).panels("step")


PANELS = [Panel("loss", [Curve("run <1>", [1, 2, 3], [3.0, math.nan, 2.0], 0, points=True)]), Panel("rate", [])]


def test_a_picture_names_its_runs_and_is_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "a.svg", PANELS, "step")
    draw(tmp_path / "b.svg", PANELS, "step")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "run &lt;1&gt;" in text
    many = [Panel("loss", [Curve(str(number), [1, 2], [3.0, 2.0], number) for number in range(30)])]
    draw(tmp_path / "c.png", many, "step")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "problem"), [("a.pdf", r"must end in .svg or .png"), ("a", "must end in"), ("no/a.svg", "that is there")]
)
def test_a_picture_that_cannot_be_drawn(tmp_path, name, problem):
    with pytest.raises(ConfigError, match=problem):
        draw(tmp_path / name, PANELS, "step")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'abi_py\[plot\]'"):
        draw(tmp_path / "a.svg", PANELS, "step")

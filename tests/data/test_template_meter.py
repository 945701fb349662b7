"""The steps of a rendering: what a value weighs, and that a conversation explains its own templates."""

import pytest

from abi_py.data.template_meter import CHARACTERS, STEPS, STEPS_EACH, Meter, StepsExceeded

LONG = "x" * (10 * CHARACTERS)


def spent(pay, values=None):
    meter = Meter(values or {})
    before = meter.left
    pay(meter)
    return before - meter.left


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ("", 1),
        (LONG, 11),
        (LONG.encode(), 11),
        (7, 1),
        (1 << 1280, 11),
        ([], 1),
        (["a", LONG], 3 + 1 + 11),
        ({"a": [1, 2]}, 2 + 1 + 3 + 2),
        ([["a"] * 9] * 9, 10 + 9 * (10 + 9)),  # one list nine times pays nine times
    ],
)
def test_every_element_is_weighed_as_often_as_it_is_there(value, steps):
    assert spent(lambda meter: meter.weigh(value)) == steps


def test_a_sequence_may_be_paid_without_its_elements():
    assert spent(lambda meter: meter.length([LONG, LONG])) == 3
    assert spent(lambda meter: meter.length(LONG)) == 11
    assert spent(lambda meter: list(meter.made(iter("abc")))) == 3


def test_a_conversation_brings_steps_and_its_own_parts_are_known():
    talk = [{"role": "user", "content": LONG}]
    meter = Meter({"messages": talk})
    assert meter.left > STEPS + STEPS_EACH * 11
    before = meter.left
    meter.weigh(talk)
    assert 0 < before - meter.left < spent(lambda other: other.weigh(talk))


def test_too_few_steps():
    with pytest.raises(StepsExceeded):
        Meter({}).spend(STEPS + 1)
    with pytest.raises(StepsExceeded):
        Meter({}).weigh(["a"] * STEPS)

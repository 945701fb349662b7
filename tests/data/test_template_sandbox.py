"""Templates of others end: in an error with its line where they would fill memory or time, else as in any sandbox."""

import threading

import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py.data import ChatTemplate
from abi_py.data import template_sandbox as sandbox
from abi_py.errors import ConfigError, DataError

TALK = [{"role": "user", "content": "a % {} <b>\n" * 20}, {"role": "assistant", "content": "b"}]
RANGE = "{% for i in range(10**4) %}"
DOUBLED = "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
TWO = DOUBLED + DOUBLED.replace("ns", "nt")
TUPLES = DOUBLED.replace("[ns.x, ns.x]", "(ns.x, ns.x)").replace("['ab']", "('ab', 'c')")

ENDLESS = {
    "loops in loops": RANGE * 3 + "{{ i }}" + "{% endfor %}" * 3,
    "empty loops": RANGE * 3 + "{% endfor %}" * 3,
    "loops whose condition fails": RANGE * 3 + "{% for j in range(10**5) if false %}{% endfor %}" + "{% endfor %}" * 3,
    "text in a loop": RANGE * 2 + "x" * 5000 + "{% endfor %}" * 2,
    "a loop in a block": "{% set x %}" + RANGE * 3 + "y" + "{% endfor %}" * 3 + "{% endset %}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(50) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{{ loop([1]) }}{% endfor %}",
    "product": "{{ 'a' * 2000000000 }}",
    "product the other way": "{{ 2000000000 * 'a' }}",
    "product of a list": "{{ ([1] * 2000000000) | length }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling []": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (1000000000, 1) }}",
    "percent with a point": "{{ '%.1000000000f' % 1 }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format in a format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "the filter center": "{{ 'a' | center(10**9) }}",
    "a constant that is not computed while compiling": "{% set x = 'a' | center(10**9) %}",
    "center": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent by text": "{{ messages[0].content | indent('x' * 10**6) }}",
    "join": "{{ range(10**5) | join('x' * 10**5) }}",
    "str.join": "{{ ('x' * 10**5).join(('y ' * 10**5).split()) }}",
    "replace": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "str.replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "str.translate": "{{ ('a' * 10**5).translate({97: 'b' * 10**5}) }}",
    "wordwrap": "{{ ('a' * 10**5) | wordwrap(1, wrapstring='b' * 10**5) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9, 'x') | list }}",
    "slices of nothing": "{{ [] | slice(10**9) | list | length }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "striptags": "{{ ('<!---->' * 10**5) | striptags }}",
    "a list in itself, written": DOUBLED + "{{ ns.x }}",
    "a list in itself, as text": DOUBLED + "{% set y = ns.x | string %}",
    "a list in itself, as JSON": DOUBLED + "{{ ns.x | tojson }}",
    "a list in itself, joined to text": DOUBLED + "{{ 'a' ~ ns.x }}",
    "a list in itself, in a percent": DOUBLED + "{{ '%s' % (ns.x,) }}",
    "a list in itself, in a format": DOUBLED + "{{ '{}'.format(ns.x) }}",
    "a list in itself, in capitals": DOUBLED + "{{ ns.x | upper }}",
    "a list in itself, in a message": DOUBLED + "{{ raise_exception(ns.x) }}",
    "a list in itself, as a wrong key": DOUBLED + "{{ messages[ns.x] }}",
    "a list in itself, in a namespace": DOUBLED + "{{ namespace(a=ns.x) }}",
    "two lists in themselves, compared": TWO + "{% if ns.x == nt.x %}{% endif %}",
    "two lists in themselves, tested": TWO + "{{ [ns.x] | select('==', nt.x) | list }}",
    "two lists in themselves, counted": TWO + "{{ [ns.x].count(nt.x) }}",
    "a tuple in itself, hashed": TUPLES + "{{ {ns.x: 1} | length }}",
    "a tuple in itself, looked up": TUPLES + "{{ messages[0][ns.x] }}",
    "a tuple in itself, got": TUPLES + "{{ messages[0].get(ns.x) }}",
    "a tuple in itself, in dict()": TUPLES + "{{ dict([(ns.x, 1)]) | length }}",
    "searched again and again": "{% set x = 'ab' * 10**5 %}" + RANGE + "{{ 'aba' in x }}{{ x.count('z') }}{% endfor %}",
    "copied again and again": "{% set x = 'ab' * 10**5 %}" + RANGE + "{% set y = x[1:] %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_not_end_is_an_error(name):
    source = "\n" + ENDLESS[name] + "\n"
    with pytest.raises(DataError, match=r"^mine:[234]: (takes more steps|fails on this conversation: Recursion)"):
        ChatTemplate(source, "mine").render(TALK)


def test_the_line_is_that_of_the_loop():
    source = "{% for m in messages %}\n{{ m.role }}\n  {{ 'x' * 10**9 }}\n{% endfor %}"
    with pytest.raises(DataError, match=r"mine:3: takes more steps than a conversation of this size explains \("):
        ChatTemplate(source, "mine").render(TALK)
    with pytest.raises(DataError, match="mine:2: fails on this conversation: TypeError"):
        ChatTemplate("a\n{{ none + 1 }}", "mine").render(TALK)
    with pytest.raises(DataError, match=r"mine: no, thank you$"):
        ChatTemplate("a\n{{ raise_exception('no, thank you') }}", "mine").render(TALK)
    with pytest.raises(DataError, match=r"^mine: no, thank you$"):  # an error is one line
        ChatTemplate("a\n{{ raise_exception('no,\\n thank you') }}", "mine").render(TALK)


def test_it_holds_in_every_thread():
    failed, template = [], ChatTemplate(ENDLESS["product"])

    def render():
        with pytest.raises(DataError):
            template.render(TALK)
        failed.append(ChatTemplate("{{ messages | length }}").render(TALK))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == ["2"] * 4


def test_a_long_conversation_has_more_steps():
    """Loops over all turns for each turn are usual; so is a text that grows with each turn."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + m.content %}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[loop.index:] | length }}"
        "{% endfor %}{{ ns.text }}"
    )
    talk = [{"role": "user", "content": f"message {i} "} for i in range(300)]
    text = ChatTemplate(source).render(talk)
    assert text.endswith("".join(turn["content"] for turn in talk))


def test_too_deep_a_template_is_an_error():
    for source in ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for i in x %}" * 30 + "{% endfor %}" * 30):
        with pytest.raises(ConfigError, match="mine: not a template that can be compiled"):
            ChatTemplate(source, "mine")


def test_an_old_jinja_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.jinja2, "__version__", "3.1.5")
    sandbox.environment.cache_clear()
    with pytest.raises(ConfigError, match=r"jinja2 \(3\.1\.5\) must be 3\.1\.6 or newer"):
        ChatTemplate("")
    monkeypatch.undo()
    assert ChatTemplate("a").render([]) == "a"


# -- the same text as Jinja's own sandbox --------------------------------------------------------

EXPRESSIONS = [
    "'a' + x + 'b'",
    "1 + 2 + n",
    "n + 1 - 2 * 3",
    "[1] + [n] + items",
    "'a' ~ n ~ items",
    "x * 3",
    "items * 2",
    "n ** 2",
    "'%s-%5d' % (x, n)",
    "'%s' | format(x)",
    "'{:>5}|{}'.format(n, x)",
    "x.center(9)",
    "x | center(9)",
    "x.split('a')",
    "x[1:]",
    "x[::-1]",
    "items[:2]",
    "items == [1, 2, 3]",
    "n in items",
    "'a' in x",
    "x != n",
    "1 < n < 9",
    "items | sum",
    "items | join('-')",
    "items | map('string') | join",
    "items | select('odd') | list",
    "items | batch(2, 'x') | list",
    "items | reverse | list",
    "items | sort(reverse=true)",
    "items | max",
    "{'k': x, n: 1}",
    "{'k': 1}[x] is defined",
    "messages | map(attribute='role') | list",
    "messages | groupby('role') | list | length",
    "messages | tojson(indent=1)",
    "x | replace('a', 'bb')",
    "x.replace('a', 'bb')",
    "'-'.join(['a', x])",
    "x | indent(2)",
    "x | trim | upper | title",
    "messages[0].get('role', 'z')",
    "messages[0].items() | list | length",
    "dict(a=n)",
    "missing | default('d')",
    "missing",
    "x | wordwrap(3)",
    "n / 2",
    "n // 2",
    "n % 2",
    "x is string and n is number",
    "(x, n) == (x, n)",
    "none",
    "true",
    "'<b>' | e",
    "'<b>x</b>' | striptags",
    "items | first + items | last",
    "[x, [n]] | string",
    "not items",
    "-n",
    "x.encode('utf-8') | string",
    "'a\tb'.expandtabs(4)",
    "'abc'.translate({97: 'z'})",
    "x | length",
    "cycler(1, 2).next()",
]
STATEMENTS = [
    "{% for m in messages if m.role != 'tool' %}{{ loop.index }}{{ loop.length }}{{ m.role }}{% else %}no{% endfor %}",
    "{% for m in messages | reverse %}{{ loop.revindex }}{{ loop.last }}{% endfor %}",
    "{% macro f(a, b='z') %}[{{ a }}{{ b }}{{ caller() if caller else '' }}]{% endmacro %}"
    "{{ f(1) }}{% call f(2) %}c{% endcall %}",
    "{% set y %}a{{ x }}{% endset %}{{ y | upper }}{% filter upper %}q{{ x }}{% endfilter %}",
    "{% for i in [1, [2, 3]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
    "{% for a, b in messages[0].items() %}{{ a }}={{ b }};{% endfor %}{% set a, b = 1, 2 %}{{ a + b }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{% endfor %}",
    "{% with q = x %}{{ q }}{% endwith %}{{ 'c' if n > 3 else 'd' }}{{ '' if false }}",
]  # fmt: skip


SOURCE = "|".join(["{{ " + expression + " }}" for expression in EXPRESSIONS] + STATEMENTS)


@pytest.fixture(scope="module")
def plain():
    """Return Jinja's own sandbox with what the meter's has, and the template in it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = sandbox._tojson
    return environment.from_string(SOURCE), ChatTemplate(SOURCE)


@settings(deadline=None, max_examples=30)
@given(x=st.text("ab <\n", max_size=8), n=st.integers(0, 9))
def test_the_meter_changes_no_text(plain, x, n):
    want, got = plain
    values = {"x": x, "n": n, "items": [1, 2, 3]}
    assert got.render(TALK, variables=values) == want.render(messages=TALK, **values)

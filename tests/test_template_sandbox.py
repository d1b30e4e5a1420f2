"""localmoe.template_sandbox: templates that want out, or want everything, are stopped."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

from localmoe import template_sandbox
from localmoe.errors import ModelError, UsageError
from localmoe.template import Template
from localmoe.template_sandbox import MAX_SOURCE, Sandbox
from tests.chat_templates import HELLO
from tests.test_template import template

TOO_MUCH, TOO_LONG = "makes too much text", "has not ended"
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(200) %%}%s{%% endfor %%}{{ ns.x }}"
OUTSIDE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ range.__self__.x }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ dict.mro() }}",
    "{{ dict.fromkeys([1]) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ''|attr('__class__') }}",
    "{{ [1]|map(attribute='__class__.__mro__')|list|first.x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ (1).to_bytes(9) }}",
    "{% for x in [1] %}{{ loop._iterator.x }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._environment.x }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% from '/etc/passwd' import x %}",
    "{% extends '/etc/passwd' %}",
    "{% block x %}{% endblock %}",
    "{% autoescape true %}{% endautoescape %}",
]
REASONS = ("unsafe", "undefined", "No filter", "underscore", "has no attribute", "not for chat templates")
GREEDY = [
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**6) * 10**6 }}",
    "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    GROW % ("'ab'", "{% set ns.x = ns.x + ns.x %}"),
    GROW % ("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    GROW % ("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"),
    GROW % ("'ab'", "{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    GROW % ("'ab'", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    GROW % ("'ab'", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
    GROW % ("'ab'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    GROW % ("[1]", "{% set ns.x = ns.x + ns.x %}"),
    GROW % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    GROW % ("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
    GROW % ("[1]", "{% set ns.x = {1: ns.x, 2: ns.x} %}"),
    GROW % ("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    GROW % ("[1]", "{% set ns.x = [ns.x, ns.x] | map('list') | list %}"),
    "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW % ("'ab'", "{% set ns.x = m(ns.x) %}"),
    "{% set a = 'a' * 10**6 %}" + "{% set b = [a[1:], a[2:], a[3:]] %}" * 9,
    "{{ range(99999)|map('string')|map('replace', '1', 'b' * 9999)|list|length }}",
    "{{ ('a' * 10**6)|list|length }}",
]
SLOW = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% set a = 'ab' * 2000000 %}" + "{% if 'aab' in a %}{% endif %}" * 2000,
    "{% for a in range(99999) %}{{ range(99999)|list|length if a < 0 }}{{ range(99999)|list|length }}{% endfor %}",
    "{% macro m(n) %}{% for i in range(9) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ m(20) }}",
]
WRONG = [
    ("{{ 2 ** 99999999999 }}", "more than 4096 bits"),
    ("{{ (2 ** 4000) * (2 ** 4000) }}", "more than 4096 bits"),
    ("{{ [0] * 10**10 }}", "for numbers"),
    ("{{ '%1000000000d' % 1 }}", "for numbers"),
    ("{{ 'a'|center(10**10) }}", "No filter"),
    ("{{ 'a'|indent(10**10) }}", "No filter"),
    ("{{ '%9d'|format(1) }}", "No filter"),
    ("{{ 'a'.center(10**10) }}", "unsafe"),
    ("{{ 'a'.ljust(10**10) }}", "unsafe"),
    ("{{ 'a'.zfill(10**10) }}", "unsafe"),
    ("{{ '\t'.expandtabs(10**10) }}", "unsafe"),
    ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
    ("{{ '{:1000000000}'.format(1) }}", "unsafe"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("{{ messages|tojson(indent=10**9) }}", "long separators"),
    ("{{ messages|tojson(separators=('a' * 999, ':')) }}", "long separators"),
    ("{{ messages|tojson(ensure_ascii=true) }}", "not implemented"),
    ("{{ strftime_now('%c' * 999) }}", "long format"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    (GROW.replace("200", "9999") % ("[1]", "{% set ns.x = [ns.x] %}"), "recursion"),
    ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "recursion"),
    ("{% if 1 %}" * 400 + "{% endif %}" * 400, "not valid"),
    ("{% for a in 'x' %}" * 99 + "{% endfor %}" * 99, "not valid"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages + 1 }}", "concatenate"),
    ("{{ messages.x.y }}", "has no attribute"),
    ("{{ ", "not valid"),
    ("x" * (MAX_SOURCE + 1), "expected at most 65,536"),
]


@pytest.mark.parametrize("text", OUTSIDE)
def test_nothing_outside_is_reached(text: str) -> None:
    """Fails if anything of Python or of the machine comes out, or if what is given can be changed."""
    sandbox = Sandbox()
    messages = [{"role": "user", "content": "x"}]
    # Some ways give nothing, the others are refused.
    try:
        assert sandbox.run(sandbox.from_string(text), {"messages": messages}, 1) in ("", "Undefined")
    except TemplateError as refusal:
        assert any(reason in str(refusal) for reason in REASONS)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("text", GREEDY)
def test_what_is_made_is_bounded(text: str) -> None:
    """Fails if a few characters of a template can fill memory; without a bound most of these would."""
    with pytest.raises(ModelError, match=TOO_MUCH):
        template(text).render([HELLO])


@pytest.mark.parametrize("text", SLOW)
def test_time_is_bounded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "_SECONDS", 0.05)
    with pytest.raises(ModelError, match=TOO_LONG):
        template(text).render([HELLO])


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_fails_is_one_sentence_with_the_file(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        template(text).render([HELLO])
    assert str(caught.value).startswith("tokenizer_config.json: its chat template") and "\n" not in str(caught.value)


def test_a_long_conversation_has_room() -> None:
    """Fails if the bound does not grow with what is given."""
    text = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}"
    )
    messages = [{"role": "user", "content": "x" * 1_000_000} for _ in range(20)]
    assert len(template(text).render(messages).text) == 20_000_000


def test_a_refusal_cannot_steer_a_terminal() -> None:
    with pytest.raises(UsageError) as caught:
        template("{{ raise_exception('\x1b]0;x\x07' * 999) }}").render([HELLO])
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


USED = [
    "{{ {'b': [1, 'é<'], 'a': none} | tojson }}",
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}{{ [1] | tojson(indent=2) }}",
    "{{ dict(a=1, b=2).items() | map('first') | join('-') }}{{ namespace({'a': 1}, b=2).a }}",
    "{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}.keys() | list }}{{ [1, 'a', [2]] | string | safe }}",
    "{{ [3, 1, 2] | sort | reverse | list }}{{ ['a', 'B'] | map('upper') | join }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}",
    "{{ messages[-1]['content'][:2] ~ 1 }}{{ 'a,b'.split(',')[::-1] }}{{ ', '.join(['a', 'b']) }}",
    "{% for m in messages %}{{ m.content.replace('e', 'é').replace('l', '', 1) }}{{ '-'.join(m) }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{% endfor %}",
    "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% macro m(a, b=2) %}{{ caller(a) }}{{ b }}{% endmacro %}{% call(x) m(1) %}<{{ x }}>{% endcall %}",
    "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ -1 * 2 }}{{ 1.5 * 2 }}{{ 'ab' * 2 }}{{ 1 / 3 }}",
    "{{ 'ABC' | replace('B', 'x', 1) }}{{ ' a ' | trim }}{{ x | default('d') }}{{ x }}",
    "{{ 'a' is string and x is undefined and 1 in [1] and not (2 < 1) }}{{ (1, 2) }}{{ messages[0] is mapping }}",
    "{% set x %} {{ 1 }} {% endset %}{{ x.strip() }}{% set a, b = 1, [2] %}{{ a }}{{ b }}{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("text", USED)
def test_what_templates_use_is_there(text: str) -> None:
    """Fails if a bound has taken away or changed something that templates do."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([[HELLO]], chat_template=text, add_generation_prompt=True)
    assert expected and template(text).render([HELLO]).text == expected


def test_a_template_can_be_used_again() -> None:
    """Fails if what one rendering has used up is missing in the next."""
    again: Template = template("{{ 'a' * 6000000 }}")
    assert {len(again.render([HELLO]).text) for _ in range(3)} == {6_000_000}

"""Chat templates in the manner of the published families, and conversations for them."""

from __future__ import annotations

from typing import Any

# As DeepSeek-V2 does it: roles are words, and there is no control token between turns but the end.
V2 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{{ bos_token }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {{ 'User: ' + m['content'] + '\\n\\n' }}
  {%- elif m['role'] == 'assistant' -%}
    {{ 'Assistant: ' + m['content'] + eos_token }}
  {%- else -%}
    {{ m['content'] ~ '\\n\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_SYSTEM_FIRST = """{% set ns = namespace(system='', several=false) %}
{%- for m in messages if m.role == 'system' %}
{%- set ns.system = ns.system + ('\\n\\n' if ns.several else '') + m.content %}{% set ns.several = true %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}"""

V3 = (
    _SYSTEM_FIRST
    + """
{%- for m in messages %}
  {%- if m['role'] == 'user' %}
    {{- '<｜User｜>' + m['content'] }}
  {%- elif m['role'] == 'assistant' and m['content'] is not none %}
    {{- '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '<｜Assistant｜>' }}{% endif %}"""
)

R1 = V3.replace("m['content'] + '<｜end", "m['content'].split('</think>')[-1] + '<｜end").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}"
)

V31 = "{% if thinking is not defined %}{% set thinking = false %}{% endif %}" + V3.replace(
    "'<｜Assistant｜>' + m['content']", "'<｜Assistant｜></think>' + m['content']"
).replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}")

# As GLM does it: macros, slices, filters, reasoning of earlier replies, and thinking that is on unless it is off.
GLM = """{%- macro said(content) -%}
{%- if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{{ bos_token }}
{%- for m in messages %}
  {%- if loop.first and m.role not in ['system', 'user'] %}{{ raise_exception('begin with a question') }}{% endif %}
  {%- if m.role == 'system' %}{{ '<｜latest_reminder｜>' }}{{ said(m.content) | trim }}
  {%- elif m.role == 'user' %}{{ '<｜User｜>\\n' }}{{ said(m.content) -}}
  {%- else %}{{ '<｜Assistant｜>' }}
    {%- if loop.index0 > ns.last and m.reasoning_content is defined %}
      {{- '\\n<think>' ~ m.reasoning_content.strip() ~ '</think>' }}
    {%- else %}{{ '\\n<think></think>' }}{% endif %}
    {%- if said(m.content).strip() %}{{ '\\n' + said(m.content).strip() }}{% endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<｜Assistant｜>' }}{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif %}"""

TEMPLATES = {"V2": V2, "V3": V3, "R1": R1, "V3.1": V31, "GLM": GLM}

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Tell me of a frog; 你好 🐱"}
REPLY = {"role": "assistant", "content": "  A frog.\n", "reasoning_content": "What do I know of frogs?"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [HELLO],
    "a system text": [SYSTEM, HELLO],
    "two system texts": [SYSTEM, HELLO, {"role": "system", "content": "In rhymes."}, HELLO],
    "several turns": [SYSTEM, HELLO, REPLY, {"role": "user", "content": " and\n\n\tthen? {{ 7 * 7 }} % {# x #}"}],
    "without reasoning": [HELLO, {"role": "assistant", "content": "No."}, HELLO, REPLY, HELLO],
    "empty texts": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
}
SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}

#!/usr/bin/env python3
"""Writes src/model/goldens/templates.json: chat templates in the styles of well-known models, rendered by Python's jinja2
set up as `transformers` sets it up.

    pip install jinja2 gguf numpy
    scripts/template_goldens.py [SmolLM2-135M-Instruct.Q4_1.gguf]

With the file, the demo model's own template is rendered too ("demo"; its source stays in the model).
"""
import json
import pathlib
import re
import sys

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = pathlib.Path(__file__).resolve().parent.parent / "src/model/goldens/templates.json"

TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' ~ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # System text inside the first user turn; strict alternation.
    "llama-2": """\
{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set turns = messages %}
    {% set system = false %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] %}
    {% else %}
        {% set content = turn['content'] %}
    {% endif %}
    {% if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {% elif turn['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {% endif %}
{% endfor %}""",
    # Header tokens, a date, tools as JSON, calls and their results.
    "llama-3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You can call these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # A namespace that counts, a check of alternation, the system text in front of the last user turn.
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] and not message.get("tool_calls") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
""",
    # ChatML with a default system text, tools in XML tags, tool results grouped into one user turn.
    "qwen-2.5": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    # Tools described in a system turn of their own, calls in tags, results of functions in tags of their own role.
    "hermes-2-pro": """\
{{- bos_token }}
{{- '<|im_start|>system\\n' }}
{{- "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. Here are the available tools: <tools> " }}
{%- for tool in tools or [] %}
    {%- set function = tool.function if tool.function is defined else tool %}
    {{- '{"type": "function", "function": {"name": "' + function.name + '", "description": "' + function.description + '", "parameters": ' + function.parameters|tojson + '}}' }}
    {%- if not loop.last %}
        {{- "\\n" }}
    {%- endif %}
{%- endfor %}
{{- ' </tools>For each function call return a json object with function name and arguments within <tool_call></tool_call> XML tags.<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" or (message.role == "assistant" and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' }}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments|tojson }}
            {{- '}' }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>tool\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' }}
        {{- message.content }}
        {%- if not loop.last %}
            {{- '\\n</tool_response>\\n' }}
        {%- else %}
            {{- '\\n</tool_response>' }}
        {%- endif %}
        {%- if not loop.last and loop.nextitem.role != "tool" %}
            {{- '<|im_end|>' }}
        {%- elif loop.last %}
            {{- '<|im_end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    # Calls as names with arguments behind a marker each, tools in front of everything.
    "mistral-new": """\
{{- bos_token }}
{%- if messages[0].role == "system" %}
    {{- "[SYSTEM_PROMPT]" + messages[0].content + "[/SYSTEM_PROMPT]" }}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- if tools %}
    {{- "[AVAILABLE_TOOLS]" + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == "user" %}
        {{- "[INST]" + message.content + "[/INST]" }}
    {%- elif message.role == "assistant" %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- "[TOOL_CALLS]" + call.function.name + "[ARGS]" + (call.function.arguments | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == "tool" %}
        {{- "[TOOL_RESULTS]" + message.content + "[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}
""",
    # Thoughts of earlier turns are cut out; the list is walked backwards; a switch in the arguments.
    "thinking": """\
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # No system role, other names for roles.
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    # The system text before the first user's, contents that are lists, other names for roles.
    "gemma-3": """\
{{ bos_token }}
{%- set turns = messages -%}
{%- set before = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set before = (system if system is string else system[0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' + (before if loop.first else '') }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for item in turn['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Contents are text or a list of parts') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
""",
    # Macros, loop control, loop neighbours, joins, defaults, conditional expressions, generation marks.
    "features": """\
{#- a comment -#}
{%- macro turn(role, text, end='</turn>') -%}
<turn {{ role | upper }}>{{ text }}{{ end }}
{%- endmacro -%}
{%- for message in messages %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ turn(message.role, message.content | replace('a', 'A')) }}{% endgeneration %}
    {%- else %}
        {{- turn(message.role, message.content, end='') }}
    {%- endif %}
    {{- '\\n' if not loop.last else '' }}
    {{- loop.previtem.role if loop.previtem is defined else 'first' }},{{ loop.nextitem.role if loop.nextitem is defined else 'last' }}
{% endfor %}
roles={{ messages | map(attribute='role') | unique | join('+') }}
count={{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ undefined_thing | default('nothing') }}|{{ undefined_thing }}|{{ none }}|{{ true }}|{{ false }}|{{ 1 }}|{{ 1.5 }}|{{ 7 // 2 }}|{{ 7 % 3 }}|{{ 2 ** 3 }}
{% set parts = 'a,b,,c'.split(',') %}
{{ parts | join('/') }} {{ parts[1:3] }} {{ parts[-1] }} {{ parts | first }} {{ parts | last }} {{ 'b' in parts }}
{{ 'Title case'.title() }} {{ 'x'.upper() }} {{ ' pad '.strip() }}| {{ 'aXbX'.replace('X', '-') }} {{ 'abc'[::-1] }} {{ 'abc'[0] }} {{ 'abc' | length }}
{{ {'b': 1, 'a': [1, 2, {'c': none}]} | tojson }}
{{ {'b': 1, 'a': [1, 2, {}], 'e': [], 'u': 'é<&>\\'"\\n'} | tojson(indent=2) }}
{{ {'b': true, 'a': 0.5} | tojson(separators=(',', ':'), sort_keys=true) }}
{% for key, value in {'x': 1, 'y': 2}.items() %}{{ key }}={{ value }};{% endfor %}
{% for i in range(3) %}{{ i }}{% if not loop.last %}, {% endif %}{% endfor %}
{% if messages and messages[0] is mapping and messages is iterable and messages[0].content is string %}ok{% endif %}
{% filter upper %}filtered{% endfilter %} {% set block %}captured {{ bos_token }}{% endset %}{{ block }}
   {% if true %}
   indented
   {% endif %}
{{ add_generation_prompt }} {{ documents is none }} {{ custom if custom is defined else 'no custom' }}
{{ ["a", 'b'] }} {{ ('%s and %d' | format('x', 3)) }} {{ "a" ~ 1 ~ none ~ true }}
""",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city (°C) — \"now\"",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "days": 2}'}}

CONVERSATIONS = {
    "single": [{"role": "user", "content": "Hi there"}],
    "system": [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": " What is 2 + 2?\n"}],
    "turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello! <b>\"quoted\"</b> & 'so'"},
        {"role": "user", "content": "Größe? 你好 😀 {{ not a template }} {% raw %}"},
    ],
    "two users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "tool": [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "{\"celsius\": 21.5}", "tool_call_id": "abcdef123", "name": "get_weather"},
    ],
    "two calls": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Zürich and Oslo?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL | {"id": "xyz456789"}]},
        {"role": "tool", "content": "21.5", "tool_call_id": "abcdef123", "name": "get_weather"},
        {"role": "tool", "content": "-3", "tool_call_id": "xyz456789", "name": "get_weather"},
        {"role": "assistant", "content": "Warm and cold."},
        {"role": "user", "content": "Thanks"},
    ],
    "control": [
        {"role": "user", "content": "keep"},
        {"role": "assistant", "content": "skip"},
        {"role": "assistant", "content": "banana"},
        {"role": "user", "content": "stop"},
        {"role": "user", "content": "never"},
    ],
}

KWARGS = {
    ("llama-3", "tool"): {"tools": [TOOL]},
    ("llama-3", "single"): {"date_string": "01 Jan 2026"},
    ("mistral", "tool"): {"tools": [TOOL, TOOL]},
    ("qwen-2.5", "tool"): {"tools": [TOOL]},
    ("qwen-2.5", "two calls"): {"tools": [TOOL, TOOL]},
    ("hermes-2-pro", "tool"): {"tools": [TOOL]},
    ("hermes-2-pro", "two calls"): {"tools": [TOOL, TOOL]},
    ("mistral-new", "tool"): {"tools": [TOOL]},
    ("mistral-new", "two calls"): {"tools": [TOOL, TOOL]},
    ("thinking", "system"): {"enable_thinking": False},
    ("thinking", "turns"): {"add_generation_prompt": False},
    ("features", "single"): {"custom": [1, "two", {"three": 3}]},
}


def environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: "now"
    return made


def parsed(message: dict) -> dict:
    """Arguments of tool calls arrive as JSON text and are given to templates as objects."""
    message = json.loads(json.dumps(message))
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def case(name: str, source: str, conversation: str) -> dict:
    # `transformers` has an extension for these marks; for rendering they are transparent.
    source = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", source)
    source = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", source)
    messages, kwargs = CONVERSATIONS[conversation], KWARGS.get((name, conversation), {})
    made = {"template": name, "messages": messages, "kwargs": kwargs}
    variables = {"add_generation_prompt": True, "tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"}
    variables |= kwargs | {"messages": [parsed(message) for message in messages]}
    try:
        made["text"] = environment().from_string(source).render(**variables)
    except TemplateError as error:
        made["error"] = error.message
    return made


def main() -> None:
    old = json.loads(OUT.read_text()) if OUT.exists() else {"cases": []}
    cases = [case(name, source, conversation) for name, source in TEMPLATES.items() for conversation in CONVERSATIONS]
    if len(sys.argv) > 1:
        from gguf import GGUFReader

        source = GGUFReader(sys.argv[1]).fields["tokenizer.chat_template"].contents()
        cases += [case("demo", source, conversation) for conversation in CONVERSATIONS]
    else:
        cases += [case for case in old["cases"] if case["template"] == "demo"]
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    templates = json.dumps(TEMPLATES, ensure_ascii=False, indent=1)
    OUT.write_text(f'{{"templates": {templates},\n"cases": [\n{rows}\n]}}\n')
    print(f"{OUT.name}: {len(cases)} cases, {sum('error' in case for case in cases)} of them refusals")


if __name__ == "__main__":
    main()

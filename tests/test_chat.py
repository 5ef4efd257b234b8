import datetime
import json

import pytest

from hmoe_jax.chat import ChatTemplate, check_messages
from hmoe_jax.core import ConfigError

PLAIN = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
HELLO = [{"role": "user", "content": "hello"}]


def rendered(source: str, messages=HELLO, **arguments) -> str:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(messages, **arguments)


def test_messages_become_the_prompt():
    assert rendered(PLAIN) == "<|user|>hello<|assistant|>"
    assert rendered(PLAIN, add_generation_prompt=False) == "<|user|>hello"


def test_special_tokens_tools_and_extra_variables_reach_the_template():
    source = "{{ bos_token }}|{{ eos_token }}|{{ tools[0]['name'] }}|{{ thinking }}"
    assert rendered(source, tools=[{"name": "f"}], thinking=True) == "<s>||f|True"
    assert rendered("{{ tools is none and documents is none }}") == "True"


def test_blocks_are_trimmed_as_in_transformers():
    assert rendered("{% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"


def test_tojson_escapes_neither_html_nor_unicode():
    assert rendered("{{ {'a': \"<b>&'é'\"} | tojson }}") == """{"a": "<b>&'é'"}"""
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_loop_controls_and_generation_blocks_are_understood():
    source = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(source) == "13"
    assert rendered("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahellob"


def test_the_date_comes_from_the_clock():
    template = ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"}, clock=lambda: datetime.datetime(2024, 7, 26))
    assert template.render(HELLO) == "26 Jul 2024"


def test_the_tool_template_is_used_when_tools_are_given():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert (template.render(HELLO), template.render(HELLO, tools=[])) == ("plain", "tools")


def test_tool_calls_may_come_without_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert rendered("{{ messages[0]['content'] is none }}", [call]) == "True"


def test_rendering_leaves_the_messages_alone_and_templates_cannot_change_them():
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"^chat template: .*'append'.* is unsafe"):
        rendered("{{ messages.append(1) }}", messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must not be empty"),
        ("hello", "messages must be a list of messages, got str"),
        ({"role": "user", "content": "x"}, "messages must be a list of messages, got dict"),
        (["hello"], r"messages\[0\] must be a dict with role and content, got str"),
        ([*HELLO, {"content": "x"}], r"messages\[1\] must have a role \(text\), got None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] must have a role \(text\), got 3"),
        ([{"role": "user"}], r"messages\[0\] \(role 'user'\) must have a content, got only \['role'\]"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] must be text, .*, got int"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        check_messages(messages)


def test_content_that_is_not_json_is_rejected():
    with pytest.raises(ValueError, match=r"messages must be JSON data: Object of type object"):
        rendered(PLAIN, [{"role": "user", "content": [{"image": object()}]}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^chat template: roles must alternate$"),
        ("{{ messages[0]['content'] + 1 }}", "^chat template: can only concatenate str"),
        ("{{ missing.attribute }}", "^chat template: 'missing' is undefined$"),
        ("{{ 1 / 0 }}", "^chat template: division by zero$"),
    ],
)
def test_what_a_template_rejects_is_a_value_error_with_its_message(source, message):
    with pytest.raises(ValueError, match=message):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0].cell_contents }}",
        "{{ messages.__class__.__base__ }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% set _ = messages.clear() %}",
        "{% set _ = messages[0].update(role='x') %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source):
    with pytest.raises(ValueError, match=r"^chat template: "):
        rendered(source)


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_folder_gives_the_template_and_its_special_tokens(tmp_path):
    write_config(tmp_path, chat_template="{{ bos_token + eos_token }}", bos_token={"content": "<s>"}, eos_token="e")
    assert ChatTemplate.from_folder(tmp_path).render(HELLO) == "<s>e"


def test_named_templates_are_read_from_the_config(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write_config(tmp_path, chat_template=named)
    template = ChatTemplate.from_folder(tmp_path)
    assert (template.render(HELLO), template.render(HELLO, tools=[{}])) == ("a", "b")


def test_a_jinja_file_beats_the_config_and_may_have_named_ones_beside_it(tmp_path):
    write_config(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = ChatTemplate.from_folder(tmp_path)
    assert (template.render(HELLO), template.render(HELLO, tools=[])) == ("file", "tools")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no chat template: neither chat_template.jinja nor"),
        ({"chat_template": 3}, "must be text or a list of named templates, one of them 'default', got int"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"one of them 'default', got \['rag'\]"),
        ({"chat_template": "\n{% if %}"}, "chat template, line 2: "),
        ({"chat_template": ["x"]}, "must be text or a list of named templates, .* got list"),
    ],
)
def test_a_missing_or_malformed_template_is_said_at_the_start(tmp_path, config, message):
    write_config(tmp_path, **config)
    with pytest.raises(ConfigError, match=message):
        ChatTemplate.from_folder(tmp_path)


def test_a_jinja_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: cannot be read"):
        ChatTemplate.from_folder(tmp_path)


FEATURES = """\
{{- bos_token }}
{%- set ns = namespace(n=0) %}
{%- if tools %}
{{ tools | tojson }}
{% endif %}
{% for message in messages if message.role != 'system' %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
  <{{ message['role'] | upper }}> {{ message['content'] | trim }}
    {% if message.role == 'assistant' %}{% generation %}
 {{ message.content }} {% set inner = 1 %}
    {% endgeneration %}{% endif %}
{%- endfor %}
{{ ns.n }}{{ inner is defined }}{{ dict(a=1) | tojson(indent=1) }}{{ unknown }}{{ pad_token }}
{% if add_generation_prompt %}<ASSISTANT>{% endif %}
"""


@pytest.mark.parametrize("source", [PLAIN, FEATURES])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "<é&>"}}]])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_prompt_is_the_one_that_transformers_renders(source, tools, add_generation_prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is the oracle")
    special = {"bos_token": "<s>", "pad_token": "<p>"}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " 你好 <b> "},
        {"role": "assistant", "content": "hi\n"},
        {"role": "user", "content": "e\u0301"},
        {"role": "user", "content": "cut"},
    ]
    oracle, _ = utils.render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **special,
    )
    template = ChatTemplate({"default": source}, special)
    assert template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt) == oracle[0]

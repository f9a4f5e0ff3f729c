"""Chat templates: rendering against Transformers, what the sandbox refuses, and the checks of message lists."""

import json
from datetime import datetime
from typing import Any

import pytest

from bylaw.model.chat import ChatTemplate, assistant_spans, check_messages, is_plain, open_turn, plain_template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi  <b>&</b> 'you'"}
BOT = {"role": "assistant", "content": "  Hello\nthere "}
DIALOGUE = [SYSTEM, USER, BOT, {"role": "user", "content": "Again"}, {"role": "assistant", "content": "No"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {%- else %}{{ message.content }}<|im_end|>{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {%- set content = content + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""
ODDITIES = """{%- set ns = namespace(seen=0) -%}
{%- macro show(x) %}[{{ x | tojson }}]{%- endmacro -%}
{%- for message in messages -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {%- if ns.seen == 2 %}{% continue %}{% endif -%}
    {%- if ns.seen > 4 %}{% break %}{% endif -%}
    {{ show({'text': message.content, 'é': [1, none, true]}) }}
    {% if message.content is string and tools is none and documents is defined %}
    {{ message.content | upper }}
    {% endif %}
    {% generation %}{% set inside = 1 %}{{ inside }}{% endgeneration %}{{ inside is defined }}
{% endfor %}{{ dict(a=1) }} {{ nothing }} {{ bos_token }} {{ strftime_now('%Y') }} {{ messages | tojson(indent=2) }}"""
TEMPLATES = [plain_template(False), plain_template(True), CHATML, LLAMA3, MISTRAL, ODDITIES]


@pytest.mark.parametrize("text", TEMPLATES)
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, BOT], DIALOGUE])
@pytest.mark.parametrize("generation", [False, True])
def test_rendering_is_that_of_transformers(text: str, messages: list[dict[str, str]], generation: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens: dict[str, Any] = TOKENS
    expected, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=generation, **tokens)
    assert ChatTemplate(text, "x", TOKENS).render(messages, generation) == expected[0]


def test_the_plain_template_by_hand() -> None:
    template = ChatTemplate(plain_template(False), "x", TOKENS)
    assert template.render(DIALOGUE[:2], True) == "Be brief.\n\nHuman: Hi  <b>&</b> 'you'\n\nAssistant:"
    text = "\n\nHuman: a\n\nAssistant: b</s>\n\nHuman: c\n\nAssistant: d</s>"
    messages = [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    assert template.render(messages, False) == text
    assert ChatTemplate(plain_template(True), "x", TOKENS).render(messages, False) == "<s>" + text
    assert [is_plain(one) for one in TEMPLATES] == [True, True, False, False, False, False]


def test_the_clock_is_now() -> None:
    before = datetime.now()
    shown = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", "x", {}).render([USER], False)
    assert before <= datetime.strptime(shown, "%Y-%m-%d %H:%M:%S.%f") <= datetime.now()


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.items() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.eval }}",
        "{{ '{0.__class__.__mro__}'.format('') }}{{ lipsum.__globals__['os'] }}",
        "{% set x = messages.append({'role': 'user', 'content': 'more'}) %}",
        "{{ messages[0].update(content='other') }}",
    ],
)
def test_an_escape_is_an_error_that_names_the_file(text: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(ValueError, match=r"folder/chat_template\.jinja: the chat template tries to leave its sandbox"):
        ChatTemplate(text, "folder/chat_template.jinja", TOKENS).render(messages, True)
    assert messages == [USER]


@pytest.mark.parametrize("text", ["{% include '/etc/passwd' %}", "{{ open('/etc/passwd').read() }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_an_error_that_names_the_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.jinja: the chat template fails on a dialogue of \['user'\]"):
        ChatTemplate(text, "a.jinja", TOKENS).render([USER], True)


def test_the_templates_own_complaint_is_passed_on() -> None:
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatTemplate(MISTRAL, "a.jinja", TOKENS).render([USER, USER], True)


def test_a_syntax_error_names_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"a\.jinja: line 3 of the chat template is not jinja2"):
        ChatTemplate("fine\n\n{% for %}", "a.jinja", TOKENS)


def test_spans_hold_the_answers_and_what_ends_them() -> None:
    template = ChatTemplate(CHATML, "x", TOKENS)
    text = template.render(DIALOGUE, False)
    spans = assistant_spans(template, DIALOGUE, text)
    assert [text[slice(*span)] for span in spans if span] == ["  Hello\nthere <|im_end|>\n", "No<|im_end|>\n"]
    # Within a prompt, the earlier turns stand at the same places.
    assert assistant_spans(template, DIALOGUE[:4], template.render(DIALOGUE[:4], True)) == spans[:1]


def test_a_turn_that_is_written_otherwise_later_has_no_span() -> None:
    text = "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
    text += "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    template = ChatTemplate(text, "x", TOKENS)
    rendered = template.render(DIALOGUE, False)
    first, last = assistant_spans(template, DIALOGUE, rendered)
    assert first is None and last is not None and rendered[slice(*last)] == "(thought)No"


def test_a_prompt_that_forgets_the_dialogue_has_no_span() -> None:
    text = "{% for m in messages if not add_generation_prompt %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(text, "x", TOKENS)
    assert assistant_spans(template, DIALOGUE, template.render(DIALOGUE, False))[1] is None


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (plain_template(False), "\n\nAssistant: The answer is ("),
        (CHATML, "<|im_start|>assistant\nThe answer is ("),
        (LLAMA3, "<|end_header_id|>\n\nThe answer is ("),
        (MISTRAL, " [/INST] The answer is ("),
    ],
)
def test_an_open_turn_stands_where_the_template_writes_it(text: str, end: str) -> None:
    template = ChatTemplate(text, "x", TOKENS)
    prompt = template.render(DIALOGUE[:4], True)
    opened = open_turn(template, DIALOGUE[:4], prompt, "The answer is (")
    assert opened.startswith(prompt) and opened.endswith(end)
    assert open_turn(template, DIALOGUE[:4], prompt, "The answer is ( ") == opened + " "


def test_an_open_turn_that_cannot_follow_the_prompt_is_an_error() -> None:
    template = ChatTemplate("{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}", "a.jinja", TOKENS)
    with pytest.raises(ValueError, match=r"a\.jinja: an answer that begins 'So' does not follow"):
        open_turn(template, [USER], template.render([USER], True), "So")


def test_messages_that_are_right_pass() -> None:
    for messages in ([USER], [SYSTEM, USER], DIALOGUE[:4]):
        check_messages(messages, "x")
        check_messages(messages, "x", last="")
    check_messages(json.loads(json.dumps(DIALOGUE)), "x", last="assistant")


@pytest.mark.parametrize(
    ("messages", "last", "message"),
    [
        (DIALOGUE, "user", "the last message has the role 'assistant'; here it must be 'user'"),
        ([USER], "assistant", "the last message has the role 'user'; here it must be 'assistant'"),
        ([SYSTEM], "", "the last message has the role 'system'"),
        ([SYSTEM, SYSTEM, USER], "user", "message 2 has the role 'system' where 'user' must stand"),
        ([SYSTEM, BOT], "assistant", "message 2 has the role 'assistant' where 'user' must stand"),
        ([USER, USER], "user", "message 2 has the role 'user' where 'assistant' must stand"),
        ([USER, {"role": "assistant", "content": " \n"}, USER], "user", "message 2: content = "),
        ([{"role": "user", "content": None}], "user", "message 1: content = None"),
        ([], "user", "messages = []"),
    ],
)
def test_messages_that_are_wrong_are_named(messages: list[dict[str, str]], last: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_messages(messages, "file.jsonl:3", last)
    assert str(caught.value).startswith("file.jsonl:3: ") and message in str(caught.value)

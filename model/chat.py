"""Dialogues as message lists, and the chat templates that turn them into text."""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]
"""Turns with `role` and `content`. Where token ids are asked for, an assistant turn may also bring its own: `ids`."""
Span = tuple[int, int]
# What stands in a rendering for a turn that is given as ids: a character from the last private-use plane.
_FIRST_STAND_IN, _LAST_STAND_IN = 0x100000, 0x10FFFD

# The dialogue form of base models and of hh-rlhf. The generation prompt ends at the colon, without the space, because
# tokenizers put that space into the answer's first word. `{% generation %}` marks what training learns.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '\\n\\nHuman: ' + message['content'] }}
    {%- else %}
        {{- '\\n\\nAssistant:' }}
        {%- generation %}
            {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
PLAIN_STOP_STRINGS = ("\n\nHuman:",)
ROLES = ("system", "user", "assistant")


def plain_template(begin: bool) -> str:
    """The built-in template, with the tokenizer's bos token in front if `begin`."""
    return "{{- bos_token }}\n" + PLAIN_TEMPLATE if begin else PLAIN_TEMPLATE


def is_plain(text: str) -> bool:
    """Whether a chat template is the built-in one."""
    return text in (plain_template(False), plain_template(True))


def check_messages(messages: Messages, where: str, last: str = "user") -> None:
    """Check a dialogue: known roles, text in every turn, at most one system message (first), then user and assistant
    in turn, ending with a turn of `last` ("user" for a prompt, "assistant" for a training text, "" for either).

    Raises ValueError naming `where` and the number of the message, from 1.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: messages = {messages!r:.80}; allowed: a list of at least one {{role, content}}")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"{where}: message {number}")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for index, role in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            number = index + 1 + len(roles) - len(turns)
            raise ValueError(
                f"{where}: message {number} has the role {role!r} where {expected!r} must stand; "
                "allowed: one system message at most, first, then user and assistant in turn"
            )
    if roles[-1] == "system" or last not in ("", roles[-1]):
        raise ValueError(f"{where}: the last message has the role {roles[-1]!r}; here it must be {last or 'user'!r}")


def _check_message(message: Mapping[str, Any], where: str) -> None:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        shown = sorted(map(str, message)) if isinstance(message, Mapping) else message
        raise ValueError(f"{where}: {shown!r:.80}; allowed: an object with the keys role and content, and no others")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: role = {role!r:.40}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: content = {content!r:.40}; allowed: text that is not empty")


class ChatTemplate:
    """A Hugging Face chat template, run in jinja2's immutable sandbox with the globals and settings of Transformers.

    `source` is the file it came from, for messages; `tokens` are bos_token, eos_token and the like, which the template
    may use. Raises ValueError naming `source` for a template that is not valid jinja2, that fails, or that reaches for
    what the sandbox forbids.
    """

    def __init__(self, text: str, source: str, tokens: Mapping[str, str]) -> None:
        self.text, self.source, self.tokens = text, source, dict(tokens)
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{source}: line {error.lineno} of the chat template is not jinja2: {error.message}"
            ) from error

    def render(self, messages: Messages, generation: bool) -> str:
        """The dialogue as text, ending with the prompt for an assistant turn if `generation`."""
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            # Transformers passes tools and documents even without any, and templates ask whether they are defined.
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=generation, **self.tokens
            )
        except jinja2.exceptions.SecurityError as error:
            raise ValueError(f"{self.source}: the chat template tries to leave its sandbox: {error}") from error
        except Exception as error:  # a template is a program: it can fail in any way
            roles = [message["role"] for message in messages]
            raise ValueError(f"{self.source}: the chat template fails on a dialogue of {roles}: {error}") from error


def assistant_spans(
    template: ChatTemplate, messages: Messages, text: str, skip: Collection[str] = ()
) -> list[Span | None]:
    """Where each assistant turn of `messages` stands in their rendering `text`: from the end of the prompt for it to
    the end of the turn, whatever the template writes there (end-of-turn token, newline) included. Turns whose content
    is in `skip` are left out.

    None for a turn whose prompt, or whose own rendering, is not how `text` begins: the template writes it otherwise
    once the dialogue goes on (reasoning models strip old thoughts), so text sampled in its place never looks so.
    """
    spans: list[Span | None] = []
    end = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message["content"] in skip:
            continue
        prompt = template.render(messages[:index], generation=True)
        through = template.render(messages[: index + 1], generation=False)
        stable = text.startswith(through) and through.startswith(prompt) and len(prompt) >= end
        spans.append((len(prompt), len(through)) if stable else None)
        end = len(through) if stable else end
    return spans


class Place(NamedTuple):
    """Where a turn given as ids stands in a rendering: the end of the prompt for it, the end of its stand-in, and what
    the template closes it with ("" where that changes once the dialogue goes on).
    """

    start: int
    end: int
    closing: str


def stand_in(messages: Messages) -> tuple[Messages, dict[str, list[int]]]:
    """`messages` with a character that no content holds as the content of each turn that brings its `ids`, and the ids
    that each character stands for.

    Raises ValueError for ids in a turn that is not the assistant's: nobody sampled it.
    """
    spare = map(chr, range(_FIRST_STAND_IN, _LAST_STAND_IN + 1))
    free = (char for char in spare if not any(char in message["content"] for message in messages))
    shown: list[Mapping[str, Any]] = []
    ids: dict[str, list[int]] = {}
    for number, message in enumerate(messages, 1):
        if "ids" in message:
            if message["role"] != "assistant":
                raise ValueError(f"message {number} has the role {message['role']!r} and ids; allowed: assistant")
            char = next(free)
            ids[char] = list(message["ids"])
            message = {"role": "assistant", "content": char}
        shown.append(message)
    return shown, ids


def sampled_places(template: ChatTemplate, messages: Messages, text: str, stand_ins: Collection[str]) -> list[Place]:
    """The place of each turn of `messages` whose content is in `stand_ins`, in their rendering `text`.

    The template never sees a sampled turn's words, so what it would cut from them (the old thoughts of a reasoning
    model) stays. Raises ValueError for a template that, once the dialogue goes on, does not write a turn right after
    the prompt that it was sampled from: its ids then have no place.
    """
    places: list[Place] = []
    for index, message in enumerate(messages):
        char = message["content"]
        if char not in stand_ins:
            continue
        prompt = template.render(messages[:index], generation=True)
        # Spaces may come between: a tokenizer has them in the first token of the answer.
        before, found, after = text.removeprefix(prompt).partition(char)
        if not text.startswith(prompt) or not found or before.strip() or char in after:
            raise ValueError(
                f"{template.source}: the chat template is not prefix-stable: once the dialogue goes on, it does not "
                f"write message {index + 1} right after the prompt for it, so that the ids sampled there have no place "
                "in it; use a template that does"
            )
        ended = template.render(messages[: index + 1], generation=False).rpartition(char)[2]
        places.append(Place(len(prompt), len(text) - len(after), ended if after.startswith(ended) else ""))
    return places


def open_turn(template: ChatTemplate, messages: Messages, prompt: str, prefix: str) -> str:
    """`prompt`, the rendering of `messages` for an answer, continued by an answer that begins with `prefix` and is
    still open. What the template writes between the two (the plain one a space) is kept; what follows is cut.

    Raises ValueError for a template that does not write an answer where its prompt ends.
    """
    text = template.render([*messages, {"role": "assistant", "content": prefix}], generation=False)
    core = prefix.strip()
    start = text.find(core, len(prompt))
    if start < 0 or not text.startswith(prompt):
        raise ValueError(
            f"{template.source}: an answer that begins {prefix!r} does not follow the template's prompt for it"
        )
    return text[:start] + core + prefix[len(prefix.rstrip()) :]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`. The body is rendered as it stands: what training learns comes
    from the renderings themselves (`assistant_spans`), so that it needs no marks, which most templates lack.
    """

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        # A scope, as in Transformers: what the body sets stays inside.
        return [jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which no chat template wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

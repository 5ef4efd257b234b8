"""Chat messages to prompt text, by the Jinja template that a checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hmoe_jax.core import ConfigError
from hmoe_jax.folder import read_json, read_text, special_tokens

Message = Mapping[str, Any]
"""{"role": ..., "content": text, or None, or a list of parts}, and whatever else the template reads."""


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template, rendered with transformers' conventions in Jinja's immutable sandbox.

    A template is code from a stranger: it sees plain JSON data only, and neither Python nor the machine; its
    running time is not limited. `templates` are the sources by name; "default" is used, or "tool_use" where
    there is one and tools are given. `special_tokens` are variables of the template (`bos_token`, ...).
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], datetime] = datetime.now

    @classmethod
    def from_folder(cls, path: Path | str) -> ChatTemplate:
        """Reads chat_template.jinja, else `chat_template` of tokenizer_config.json: text, or a list of named.

        Raises `ConfigError` where there is no template, or one that Jinja cannot parse.
        """
        folder = Path(path)
        template = cls(templates=_read_templates(folder), special_tokens=special_tokens(folder))
        try:
            template._compiled  # noqa: B018  a syntax error is the checkpoint's fault: say so at the start
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{folder}: chat template, line {error.lineno}: {error.message}") from error
        return template

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text, with BOS where the template writes it: encode it without adding special tokens.

        `tools` are JSON schemas; `extra` are further variables of the template (`enable_thinking=True`).
        Raises `ValueError` for a malformed message, for data that is not JSON, and, with the template's own
        message, for what the template rejects.
        """
        check_messages(messages)
        variables = {
            "documents": None,
            **self.special_tokens,
            **{name: _plain(name, value) for name, value in extra.items()},
            "messages": [_with_content(message) for message in _plain("messages", messages)],
            "tools": _plain("tools", tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._select(has_tools=tools is not None).render(variables)
        except Exception as error:  # a template can provoke anything: raise_exception, an undefined name, 1/0
            raise ValueError(f"chat template: {error}") from error

    def _select(self, *, has_tools: bool) -> jinja2.Template:
        name = "tool_use" if has_tools and "tool_use" in self.templates else "default"
        return self._compiled[name]

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        environment = _environment(self.clock)
        return {name: environment.from_string(source) for name, source in self.templates.items()}


def check_messages(messages: object) -> None:
    """Raises `ValueError`, naming the message, unless given a non-empty list of well-formed messages."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must not be empty")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _read_templates(folder: Path) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {"default": read_text(file)} | {path.stem: read_text(path) for path in extra}
    return _named_templates(read_json(folder / "tokenizer_config.json").get("chat_template"), folder)


def _named_templates(entry: object, folder: Path) -> dict[str, str]:
    if entry is None:
        raise ConfigError(
            f"{folder}: no chat template: neither chat_template.jinja nor `chat_template` in "
            "tokenizer_config.json. A base model? Give it text, not messages"
        )
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = {str(item["name"]): str(item["template"]) for item in entry}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        named = {}
    if "default" not in named:
        raise ConfigError(
            f"{folder}/tokenizer_config.json: chat_template must be text or a list of named templates, "
            f"one of them 'default', got {sorted(named) or type(entry).__name__}"
        )
    return named


def _check_message(name: str, message: object) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a dict with role and content, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{name} must have a role (text), got {role!r}")
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"{name} (role {role!r}) must have a content, got only {sorted(message)}")
    content = message.get("content")
    if not isinstance(content, str | list | tuple | None):
        raise ValueError(f"{name}['content'] must be text, a list of parts or None, got {type(content).__name__}")


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """A message of tool calls alone may leave its content out, but templates ask whether it is none.

    transformers 5 does the opposite and drops keys that are None, which DeepSeek-V3's template cannot render.
    """
    return {"content": None} | message


def _plain(name: str, value: object) -> Any:
    """A deep copy made of JSON types only: other objects have methods that the sandbox knows nothing of."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON data: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> Scope:
        lineno = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: clock().strftime(format)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which a model was never trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

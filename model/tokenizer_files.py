"""The files of a Hugging Face folder that make a tokenizer, read and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from bylaw.model.chat import plain_template
from bylaw.model.records import decode_record

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; bylaw reads tokenizer.json (Transformers writes it: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where the file is absent."""
    if not path.is_file():
        return {}
    return decode_record(path.read_bytes(), str(path))


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, where each is a string, an object with `content`, or null."""
    found = {name: config.get(name) for name in TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if text}


def check_tokens(backend: tokenizers.Tokenizer, tokens: Mapping[str, str], source: str | Path) -> None:
    if "eos_token" not in tokens:
        raise ValueError(f"{source}: no eos_token; a model cannot end its answers without one")
    for name, token in tokens.items():
        if not isinstance(token, str) or backend.token_to_id(token) is None:
            raise ValueError(f"{source}: {name} = {token!r}; allowed: a token of the vocabulary")


def as_ids(value: Any, source: str | Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError(f"{source}: eos_token_id = {value!r}; allowed: a token id or a list of them")
    return ids


def read_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """The chat template, "" where there is none, and its file. chat_template.jinja wins, as in Transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_jinja(path), str(path)
    path = folder / "tokenizer_config.json"
    value = config.get("chat_template") or ""
    if isinstance(value, list):  # older folders: several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if not isinstance(value, str):
        raise ValueError(f"{path}: chat_template = {value!r:.60}; allowed: a text, or a list with one named default")
    return value, str(path) if value else "the built-in plain chat template"


def _read_jinja(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; write a chat template there, or delete the file for the plain one")
    return text


def plain_for(backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> str:
    """The plain template, with bos in front if the tokenizer itself begins a text with it."""
    begins = backend.encode("", add_special_tokens=True).tokens[:1]
    return plain_template(bool(begins) and begins[0] == tokens.get("bos_token"))

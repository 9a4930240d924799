"""Chat templates by name, in Unsloth's words, and ShareGPT columns made standard.

What: ``get_chat_template`` gives a tokenizer a template; ``standardize_sharegpt`` turns from/value
into role/content. How: one Jinja file per name in ``data/templates``, whose first line says what
ends a turn. Other key names and a system message are set in front of the template, so the template
itself is never rewritten by search and replace. Constraint: no token is ever added to a tokenizer
here; a turn ends with a token that the vocabulary has. Trade-off: rendering mapped keys copies the
messages once, inside the template.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "templates"
_END_OF_TURN = re.compile(r"\{#-? end_of_turn: (\S+) -?#\}\n?")
# Other names that Unsloth has for the same template.
_ALIASES = {
    **dict.fromkeys(("llama", "llama2"), "llama-2"),
    "llama3": "llama-3",
    **dict.fromkeys(("llama-31", "llama31", "llama-3.2", "llama-3.3"), "llama-3.1"),
    **dict.fromkeys(("qwen2.5", "qwen-25", "qwen25"), "qwen-2.5"),
    **dict.fromkeys(("phi-3.5", "phi-35"), "phi-3"),
    "phi4": "phi-4",
    **dict.fromkeys(("gemma2", "gemma-2"), "gemma"),
    "gemma3": "gemma-3",
}
_STANDARD = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
# Sets ``messages`` to the standard keys; messages that have them already stay as they are.
_REMAP = (
    "{%- set mapped = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- set role = m[ROLE] if ROLE in m else m['role'] -%}"
    "{%- set content = m[CONTENT] if CONTENT in m else m['content'] -%}"
    "{%- set role = {USER: 'user', ASSISTANT: 'assistant'}.get(role, role) -%}"
    "{%- set mapped.messages = mapped.messages + [dict(m, role=role, content=content)] -%}"
    "{%- endfor -%}"
    "{%- set messages = mapped.messages -%}"
)


def template_names() -> list[str]:
    """All template names, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] | Path = "chatml",
    mapping: Mapping[str, str] = _STANDARD,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Set the chat template of a tokenizer, as Unsloth's function of that name does.

    Args:
        tokenizer: Changed and returned.
        chat_template: A name from ``template_names()``, the path of a .jinja file, a Jinja
            template, or a template with the token that ends its turns.
        mapping: How the messages name role, content, user and assistant;
            ``{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}`` for
            ShareGPT. Messages with the standard names are read as well.
        map_eos_token: Make the template's end of turn the tokenizer's EOS where it is one token of
            the vocabulary; where it is not, turns end with the EOS that the tokenizer has.
        system_message: System text for conversations without one.

    Raises:
        ConfigError: FG-DATA-010 no such template, FG-DATA-016 a mapping with unknown keys, a
            template without a place for ``system_message``, or no token to end turns with.
    """
    template, end = _load(chat_template)
    if end is not None and end != "eos_token":
        template = _settle_end(tokenizer, template, end, map_eos_token)
    if end is not None and tokenizer.eos_token is None:
        raise ConfigError(
            "FG-DATA-016",
            "the tokenizer has no EOS token and the template ends turns with it",
            fix="set tokenizer.eos_token to a token of its vocabulary first",
        )
    template = _set_system(template, system_message) if system_message is not None else template
    tokenizer.chat_template = _remap(mapping) + template
    return tokenizer


def standardize_sharegpt(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    aliases_for_system: tuple[str, ...] | list[str] = ("system",),
    aliases_for_user: tuple[str, ...] | list[str] = ("user", "human", "input"),
    aliases_for_assistant: tuple[str, ...] | list[str] = ("gpt", "assistant", "output"),
) -> Dataset:
    """Return the dataset with role/content in its column ``conversations``.

    Args:
        dataset: A ``datasets.Dataset``; without such a column it comes back unchanged.
        tokenizer: Accepted because Unsloth's signature has it; not needed.
        aliases_for_system: Names that the data uses for the system.
        aliases_for_user: Names that the data uses for the user.
        aliases_for_assistant: Names that the data uses for the assistant.

    Raises:
        ConfigError: FG-DATA-016, a speaker that is in none of the aliases.
    """
    if "conversations" not in dataset.column_names:
        return dataset
    roles = {name: "system" for name in aliases_for_system}
    roles |= {name: "user" for name in aliases_for_user}
    roles |= {name: "assistant" for name in aliases_for_assistant}

    def standard(message: Mapping[str, Any]) -> dict[str, Any]:
        speaker = message["from"] if message.get("from") is not None else message["role"]
        if speaker not in roles:
            raise ConfigError(
                "FG-DATA-016",
                f"the conversations hold a speaker '{speaker}'",
                allowed=", ".join(roles),
                fix=f"add '{speaker}' to aliases_for_user or another of the aliases",
            )
        content = message["value"] if message.get("value") is not None else message.get("content")
        return {"role": roles[speaker], "content": content}

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"conversations": [[standard(m) for m in row] for row in batch["conversations"]]}

    return dataset.map(convert, batched=True, desc="role and content")


def _load(chat_template: str | tuple[str, str] | Path) -> tuple[str, str | None]:
    """The template's text and what ends a turn; None where that is not said."""
    if isinstance(chat_template, tuple):
        return _load(chat_template[0])[0], chat_template[1]
    name = _ALIASES.get(str(chat_template), str(chat_template))
    if "{{" in name or "{%" in name:
        text = name
    elif name in template_names():
        text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    elif name.endswith((".jinja", ".j2")) and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8").rstrip("\n")
    else:
        raise ConfigError(
            "FG-DATA-010",
            f"unknown chat template '{name}'",
            allowed=", ".join(template_names()) + ", the path of a .jinja file, a Jinja template",
            fix=did_you_mean(name, template_names()),
        )
    said = _END_OF_TURN.match(text)
    return (text[said.end() :], said.group(1)) if said else (text, None)


def _settle_end(
    tokenizer: PreTrainedTokenizerBase, template: str, end: str, map_eos_token: bool
) -> str:
    """Make the end of turn one token that the vocabulary has."""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        if map_eos_token and tokenizer.eos_token != end:
            _log.info("EOS is now %s, was %s", end, tokenizer.eos_token)
            tokenizer.eos_token = end
        return template
    if not map_eos_token or tokenizer.eos_token is None:
        return template
    _log.info("%s is not in the vocabulary: turns end with %s", end, tokenizer.eos_token)
    return template.replace(end, str(tokenizer.eos_token))


def _set_system(template: str, system_message: str) -> str:
    if "default_system" in template:
        # Jinja reads this as a string of its own, so quotes and braces in it stay text.
        return "{%- set default_system = " + _literal(system_message) + " -%}" + template
    if "{system_message}" in template:
        return template.replace("{system_message}", system_message)
    raise ConfigError(
        "FG-DATA-016",
        "this chat template has no place for a system message",
        allowed="a template that uses default_system or holds {system_message}",
        fix="leave system_message out and begin each conversation with a system message",
    )


def _remap(mapping: Mapping[str, str]) -> str:
    unknown = sorted(set(mapping) - set(_STANDARD))
    if unknown:
        raise ConfigError(
            "FG-DATA-016",
            f"mapping has the key '{unknown[0]}'",
            allowed=", ".join(_STANDARD),
            fix='mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"}',
        )
    names = {**_STANDARD, **mapping}
    if names == _STANDARD:
        return ""
    return re.sub("ROLE|CONTENT|USER|ASSISTANT", lambda k: _literal(names[k[0].lower()]), _REMAP)


def _literal(text: str) -> str:
    """``text`` as a Jinja string; Jinja undoes JSON's escapes and takes other characters as is."""
    return json.dumps(text, ensure_ascii=False)

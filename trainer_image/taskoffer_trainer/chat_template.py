"""Chat templates by name, and where in a rendered conversation the assistant speaks.

The templates lie beside this file as Jinja texts, in the form that ``tokenizer.chat_template`` takes. The first
line of each names its markers: texts such as ``<|im_start|>`` that should be one token each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from taskoffer.api.contract import CHAT_TEMPLATES, Clamp, ExitCode, chat_template_of
from taskoffer_trainer.chat_data import ASSISTANT, Conversation, Message
from taskoffer_trainer.failures import TrainerError, bad_data

__all__ = ["ChatTemplate", "Rendered", "named_template", "render", "use_template"]

OWN = "tokenizer-default"
"""Name that stands for the template that comes with the model."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with its markers."""

    name: str
    text: str
    markers: tuple[str, ...]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the parts of it that the assistant says, as ranges of characters.

    A part begins behind what the template writes to ask for an answer, and ends with the end of the turn, the
    marker included: that is what a model has to learn to write.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    unclear: int = 0
    """Turns that the template renders differently when more follows, so that nothing can be learnt from them."""


def named_template(name: str) -> ChatTemplate | None:
    """Return the template of a name, or None when the name stands for the model's own.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the names that there are.
    """
    plain = chat_template_of(name)
    if plain is None:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ChatTemplateUnknown",
            f"data.chat.chatTemplate: {name!r} is not known; choose one of {', '.join(CHAT_TEMPLATES)}",
        )
    if plain == OWN:
        return None
    text = files(__package__).joinpath("chat_templates", f"{plain}.jinja").read_text(encoding="utf-8")
    first = re.match(r"\{#- markers: ?(.*?)-#\}", text)
    if first is None:
        raise RuntimeError(f"the first line of the chat template {plain} does not name its markers")
    return ChatTemplate(plain, text, tuple(first[1].split()))


def use_template(tokenizer: Any, name: str) -> tuple[Clamp, ...]:
    """Give a tokenizer the template of a name.

    Markers that are no tokens of the tokenizer are trained as ordinary text: new tokens would need rows in the
    embedding and output matrices, which a LoRA adapter does not carry.

    Returns:
        What could not be done as asked.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the name is not known or the model has no template of its own.
    """
    template = named_template(name)
    if template is None:
        if not tokenizer.chat_template:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "ChatTemplateMissing",
                f"data.chat.chatTemplate: {name} stands for the model's own template, and the tokenizer has none; "
                f"choose one of {', '.join(one for one in CHAT_TEMPLATES if one != OWN)}",
            )
        return ()
    tokenizer.chat_template = template.text
    absent = [marker for marker in template.markers if not _is_token(tokenizer, marker)]
    if not absent:
        return ()
    message = (
        f"{', '.join(absent)} {'are no tokens' if len(absent) > 1 else 'is no token'} of the model's tokenizer "
        "and trained as text of several tokens; a template whose markers the model knows learns faster."
    )
    effective = f"{template.name}, {len(absent)} of {len(template.markers)} markers as text"
    return (
        Clamp(
            field="data.chat.chatTemplate",
            requested=name,
            effective=effective,
            reason="ChatMarkersAsText",
            message=message,
        ),
    )


def _is_token(tokenizer: Any, marker: str) -> bool:
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    return marker in tokenizer.convert_ids_to_tokens(ids)


def _written(tokenizer: Any, messages: Sequence[Message], ask: bool) -> str:
    """Render messages; ``ask`` adds what the template writes before an answer."""
    values = [message.for_template() for message in messages]
    return str(tokenizer.apply_chat_template(values, tokenize=False, add_generation_prompt=ask))


def _shared(left: str, right: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    if right.startswith(left):
        return len(left)
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def render(conversation: Conversation, tokenizer: Any) -> Rendered:
    """Render a conversation with the tokenizer's template and find what the assistant says.

    The template is rendered prefix by prefix: a turn of the assistant begins where the text up to the turn,
    with the request for an answer, ends, and ends where the text up to and with the turn does. That holds for any
    template that writes one message after the other.

    Raises:
        TrainerError: ``BAD_DATA`` when the template refuses the conversation.
    """
    from jinja2 import TemplateError

    messages = conversation.messages
    spans, unclear = [], 0
    try:
        text = _written(tokenizer, messages, ask=False)
        for place, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            begin = _shared(_written(tokenizer, messages[:place], ask=True), text)
            last = place + 1 == len(messages)
            end = len(text) if last else _shared(_written(tokenizer, messages[: place + 1], ask=False), text)
            if message.content in text[begin:end]:
                spans.append((begin, end))
            else:
                unclear += 1
    except TemplateError as error:
        first = conversation.first_prompt[:60]
        raise bad_data(
            "ChatTemplateRefuses",
            f"data.chat.chatTemplate: the template refuses the conversation that begins {first!r}: {error}; choose "
            f"one of {', '.join(CHAT_TEMPLATES)}, or leave such rows out",
        ) from error
    return Rendered(text, tuple(spans), unclear)

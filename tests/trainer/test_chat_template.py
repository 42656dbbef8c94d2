"""Chat templates write what they should, and the loss sees what the assistant says and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskoffer_trainer
from taskoffer.api.contract import CHAT_TEMPLATES
from taskoffer_trainer.chat_data import Conversation, Message
from taskoffer_trainer.chat_template import named_template, render, use_template
from taskoffer_trainer.chat_tokens import tokenize_conversations, turns_by_offsets, turns_by_prefixes
from taskoffer_trainer.dpo_data import Pair
from taskoffer_trainer.dpo_tokens import tokenize_pairs
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.instruct_data import Example
from taskoffer_trainer.tokens import IGNORED, Cuts, left_out_of, tokenize

pytestmark = pytest.mark.trainer

PACKAGED = Path(taskoffer_trainer.__file__).parent / "chat_templates"
TALK = Conversation(
    (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello!"),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    )
)

# Written by hand after the model makers' descriptions of their formats.
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSee you.<|im_end|>\n"
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>"
    ),
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST] See you.</s>",
    "gemma": (
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n"
    ),
    "phi-3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\nSee you.<|end|>\n"
    ),
}
LEARNT = {
    "chatml": ["Hello!<|im_end|>\n", "See you.<|im_end|>\n"],
    "llama-3": ["Hello!<|eot_id|>", "See you.<|eot_id|>"],
    "mistral": [" Hello!</s>", " See you.</s>"],
    "gemma": ["Hello!<end_of_turn>\n", "See you.<end_of_turn>\n"],
    "phi-3": ["Hello!<|end|>\n", "See you.<|end|>\n"],
}


@cache
def trained(markers: tuple[str, ...]) -> Any:
    """Train a byte-level BPE; words grow together over spaces as in real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", *markers],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello! See you. Bye, be kind. <|im_start|>assistant\n <|im_end|>\n" * 20], trainer)
    return tokenizer


def tokenizer_with(markers: tuple[str, ...] = (), template: str | None = None) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained(markers), bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


def learnt(tokenizer: Any, conversation: Conversation, max_length: int = 1000) -> list[str]:
    """The runs of tokens that count for the loss, as text."""
    (row,) = tokenize_conversations([conversation], tokenizer, Cuts(max_length, "training", 1))
    assert [one for one in row.labels if one != IGNORED] == [
        token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED
    ]
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_writes_its_format_and_only_the_assistant_is_learnt(name: str) -> None:
    template = named_template(name)
    assert template is not None
    tokenizer = tokenizer_with(template.markers)
    assert use_template(tokenizer, name) == ()
    found = render(TALK, tokenizer)
    assert (found.text, found.unclear) == (RENDERED[name], 0)
    assert [found.text[begin:end] for begin, end in found.spans] == LEARNT[name]
    turns = list(LEARNT[name])
    if not turns[-1].endswith("</s>"):
        # The model stops at </s>, so the last turn must end with it.
        turns[-1] += "</s>"
    assert learnt(tokenizer, TALK) == turns


CHATML = named_template("chatml")
ENDS = [("</s>", "<|im_end|>\n</s>"), ("<|im_end|>", "<|im_end|>\n")]
"""The model's end token, and what follows an answer then: some models end a turn with another marker."""


@pytest.mark.parametrize(("end_token", "follows"), ENDS)
def test_every_method_teaches_the_model_to_stop(end_token: str, follows: str) -> None:
    assert CHATML is not None
    tokenizer = tokenizer_with(CHATML.markers, CHATML.text)
    tokenizer.eos_token = end_token
    cuts = Cuts(1000, "training", 1)
    (row,) = tokenize([Example("", "Hi", "Hello!")], tokenizer, cuts)
    (pair,) = tokenize_pairs([Pair("", "Hi", "Hello!", "See you.")], tokenizer, cuts)
    talk = Conversation((Message("user", "Hi"), Message("assistant", "Hello!")))
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == f"Hello!{follows}"
    assert tokenizer.decode(pair.chosen_ids) == f"Hello!{follows}"
    assert tokenizer.decode(pair.rejected_ids) == f"See you.{follows}"
    assert learnt(tokenizer, talk) == [f"Hello!{follows}"]
    # One that is cut has no room for it.
    (short,) = tokenize([Example("", "Hi", "Hello!")], tokenizer, Cuts(len(row.input_ids) - 1, "training", 1))
    assert short.input_ids == row.input_ids[:-1]


def test_every_template_of_the_package_is_tested() -> None:
    assert {*RENDERED, "tokenizer-default"} == set(CHAT_TEMPLATES)
    assert {path.stem for path in PACKAGED.glob("*.jinja")} == set(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_what_a_template_asks_with_is_what_the_answer_follows(name: str) -> None:
    """At use the model gets the text up to the request for an answer; in training it must have been the same."""
    tokenizer = tokenizer_with()
    use_template(tokenizer, name)
    asked = [message.for_template() for message in TALK.messages[:-1]]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert RENDERED[name].startswith(prompt)
    assert RENDERED[name][len(prompt) :] == LEARNT[name][-1]


def test_markers_that_the_model_does_not_know_are_text_and_reported() -> None:
    tokenizer = tokenizer_with(("<|im_start|>",))
    before = len(tokenizer)
    (clamp,) = use_template(tokenizer, "chatml")
    assert (clamp.field, clamp.requested, clamp.reason) == ("data.chat.chatTemplate", "chatml", "ChatMarkersAsText")
    assert clamp.effective == "chatml, 1 of 2 markers as text"
    assert "<|im_end|> is no token" in clamp.message
    assert len(tokenizer) == before
    assert learnt(tokenizer, TALK) == ["Hello!<|im_end|>\n", "See you.<|im_end|>\n</s>"]


@pytest.mark.parametrize("name", ["ChatML", "llama3", "llama_3", "phi3", " gemma "])
def test_other_spellings_of_a_name_are_understood(name: str) -> None:
    assert named_template(name) is not None


def test_a_name_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(TrainerError, match="'klingon' is not known; choose one of chatml, gemma, llama-3") as error:
        named_template("klingon")
    assert (error.value.code, error.value.reason) == (64, "ChatTemplateUnknown")
    assert named_template("tokenizer_default") is None
    with pytest.raises(TrainerError, match="the tokenizer has none; choose one of chatml") as error:
        use_template(tokenizer_with(), "tokenizer-default")
    assert error.value.reason == "ChatTemplateMissing"


def test_the_models_own_template_is_used_where_it_is_asked_for() -> None:
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tokenizer_with(template=own)
    assert use_template(tokenizer, "tokenizer-default") == ()
    # This tokenizer has one token for " S": it is no token of the text before, so it is learnt as a whole.
    assert learnt(tokenizer, TALK) == ["Hello!\n", " See you.\n</s>"]


def test_a_template_that_refuses_a_conversation_is_bad_data() -> None:
    tokenizer = tokenizer_with(template="{{ raise_exception('no system role') }}")
    with pytest.raises(TrainerError, match="refuses the conversation that begins 'Hi': no system role") as error:
        tokenize_conversations([TALK], tokenizer, Cuts(100, "training", 1))
    assert (error.value.code, error.value.reason) == (65, "ChatTemplateRefuses")


def test_turns_that_look_different_once_more_follows_are_given_and_not_learnt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As templates do that take the thoughts out of all answers but the last."""
    own = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else '(gone)' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert learnt(tokenizer_with(template=own), TALK) == [" See you.\n</s>"]
    assert "1 turns of 1 training conversations are not learnt" in capsys.readouterr().out


def test_long_conversations_are_cut_and_left_out_when_no_answer_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    template = named_template("chatml")
    assert template is not None
    tokenizer = tokenizer_with(template.markers)
    use_template(tokenizer, "chatml")
    whole = tokenize_conversations([TALK], tokenizer, Cuts(1000, "training", 1))[0]
    first = next(place for place, label in enumerate(whole.labels) if label != IGNORED)
    cuts = Cuts(first + 1, "training", 1)
    (row,) = tokenize_conversations([TALK], tokenizer, cuts)
    assert (row.input_ids, row.labels) == (whole.input_ids[: first + 1], whole.labels[: first + 1])
    assert (cuts.cut, cuts.too_long) == (1, 0)
    with pytest.raises(TrainerError, match=r"train\.maxLength") as error:
        tokenize_conversations([TALK], tokenizer, Cuts(first, "training", 1))
    assert error.value.reason == "DataTooLong"


def test_where_the_template_keeps_no_answer_the_length_is_not_blamed(capsys: pytest.CaptureFixture[str]) -> None:
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}"
    cuts = Cuts(1000, "training", 1)
    with pytest.raises(TrainerError, match="chat template make of them has no answer") as error:
        tokenize_conversations([TALK], tokenizer_with(template=own), cuts)
    assert error.value.reason == "DataEmpty"
    assert left_out_of([cuts]) == {"nothingToLearn": 1}
    assert "1 of 1 training rows are left out" in capsys.readouterr().out


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and "<" not in text
)


@settings(deadline=None)
@given(
    texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    name=st.sampled_from(sorted(RENDERED)),
    known=st.booleans(),
)
def test_both_ways_to_find_the_turns_agree_and_give_back_what_was_said(
    texts: list[tuple[str, str]], name: str, known: bool
) -> None:
    """By offsets, and by tokenizing what goes before: the same tokens, whatever is said, markers known or not."""
    template = named_template(name)
    assert template is not None
    tokenizer = tokenizer_with(template.markers if known else ())
    use_template(tokenizer, name)
    messages = [Message(role, text) for pair in texts for role, text in zip(("user", "assistant"), pair, strict=True)]
    found = render(Conversation(tuple(messages)), tokenizer)
    encoded = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    turns = turns_by_offsets([end for _, end in encoded["offset_mapping"]], found.spans)
    assert turns == turns_by_prefixes(tokenizer, found.text, ids, found.spans)
    assert len(turns) == len(texts)
    for (begin, end), (_, answer) in zip(turns, texts, strict=True):
        assert answer in tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)

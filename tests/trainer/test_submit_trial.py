"""An adapter is tried for no longer than it takes to see that it works, and never beyond the deadline."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from taskoffer.api.contract import SubmitConfig
from taskoffer_trainer import submit_trial
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit_trial import PROMPTS, TOKENS, Trial, try_text

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def adapter(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes something."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(fixtures_dir / "llama", local_files_only=True)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of each pass through the model."""
    seen: list[int] = []
    plain = LlamaForCausalLM.forward

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(more["input_ids"].shape[1])
        return plain(self, *arguments, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return seen


def tried(adapter: Path, base: Path, interrupt: Interrupt) -> Trial:
    wire = {"jobName": "job", "taskID": "task", "adapterDir": str(adapter), "baseModel": "acme/tiny-llama"}
    config = SubmitConfig.model_validate({**wire, "baseModelPath": str(base), "unverified": True})
    return try_text(config, adapter, 28, interrupt)


def test_one_short_answer_is_enough(adapter: Path, fixtures_dir: Path, passes: list[int]) -> None:
    trial = tried(adapter, fixtures_dir / "llama", Interrupt())
    assert [one["prompt"] for one in trial.answers] == [PROMPTS[0]]
    assert trial.answers[0]["after"]
    # The look at what is finite, the prompt, and a pass for each further token.
    assert len(passes) <= 1 + TOKENS


def test_a_question_without_an_answer_is_followed_by_the_next(
    adapter: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["", "The sea."])
    monkeypatch.setattr(submit_trial, "answers", lambda *_arguments: [next(texts)])
    trial = tried(adapter, fixtures_dir / "llama", Interrupt())
    assert [(one["prompt"], one["after"]) for one in trial.answers] == [(PROMPTS[0], ""), (PROMPTS[1], "The sea.")]


def test_the_deadline_ends_an_answer_in_its_middle(adapter: Path, fixtures_dir: Path, passes: list[int]) -> None:
    class Passing(Interrupt):
        def check(self) -> None:
            if len(passes) >= 4:
                self.deadline = datetime(2020, 1, 1, tzinfo=UTC)
            super().check()

    with pytest.raises(TrainerError) as caught:
        tried(adapter, fixtures_dir / "llama", Passing())
    assert caught.value.reason == "DeadlinePassed"
    assert len(passes) == 4

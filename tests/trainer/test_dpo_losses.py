"""Every loss by name is one that the library has, and the same whether pairs go through the model at once or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from taskoffer.api.contract import DPOLossType, TrainSettings
from taskoffer_trainer.dpo_tokens import TokenPair

# peft asks for it by its old name; nobody here can do anything about it.
pytestmark = [pytest.mark.trainer, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]

PAIRS = [
    TokenPair([5, 6, 7 + number], list(range(20 + number, 24 + 2 * number)), list(range(40, 43 + number)))
    for number in range(6)
]


@pytest.fixture(scope="module")
def trainer(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer whose adapter is no zero any more, so that the losses have something to say."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    from taskoffer_trainer.dpo import PreferenceTrainer

    folder = str(fixtures_dir / "llama")
    found = PreferenceTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, local_files_only=True),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([asdict(pair) for pair in PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    torch.manual_seed(1)
    for name, parameter in found.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found


def evaluation(folder: Path, at_once: int = 6) -> Any:
    from taskoffer_trainer.evaluating import Evaluation
    from taskoffer_trainer.world import World

    return Evaluation(at_once, World(), folder)


def gradients(trainer: Any, pieces: list[list[TokenPair]]) -> tuple[float, Any]:
    """Return the loss and the gradient that pieces add up to, each divided by the number of pairs."""
    import torch

    trainer.model.zero_grad()
    total = count = 0.0
    for piece in pieces:
        loss = trainer.piece_loss(trainer.model, [asdict(pair) for pair in piece])
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + float(loss.count)
    grown = [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.requires_grad]
    return total / count, torch.cat(grown) / count


@pytest.mark.parametrize("loss_type", DPOLossType)
def test_pairs_one_by_one_give_the_gradient_of_all_at_once(loss_type: DPOLossType, trainer: Any) -> None:
    import torch

    trainer.loss_types, trainer.loss_weights = [loss_type.value], [1.0]
    trainer.label_smoothing = 0.1 if loss_type.smooths else 0.0
    whole, gradient = gradients(trainer, [PAIRS])
    parts, other = gradients(trainer, [PAIRS[:1], PAIRS[1:3], PAIRS[3:]])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert float(gradient.norm()) > 0
    assert float((gradient - other).norm()) < 1e-5 * float(gradient.norm())
    assert torch.isfinite(gradient).all()


def test_checkpointing_changes_nothing_and_leaves_nothing_behind(trainer: Any) -> None:
    """The library would leave a hook on the embedding with each piece, and make every later one slower."""
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    plain, gradient = gradients(trainer, [PAIRS])
    trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    embedding = trainer.model.get_input_embeddings()
    hooks = len(embedding._forward_hooks)
    try:
        for _ in range(3):
            loss, other = gradients(trainer, [PAIRS[:3], PAIRS[3:]])
            assert loss == pytest.approx(plain, rel=1e-6)
            assert float((gradient - other).norm()) < 1e-5 * float(gradient.norm())
        assert len(embedding._forward_hooks) == hooks
        assert trainer.model.is_activation_checkpointing
    finally:
        trainer.model.activation_checkpointing_disable()


def test_the_loss_of_the_paper_is_that_of_its_formula(trainer: Any, tmp_path: Path) -> None:
    """-log sigmoid(beta * ((log p - log q)(chosen) - (log p - log q)(rejected))), by its own arithmetic."""
    import torch

    from taskoffer_trainer.pair_figures import PairFigures, log_probs

    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    model, pad = trainer.model, trainer.processing_class.pad_token_id
    trained, _ = gradients(trainer, [PAIRS])
    model.eval()
    with torch.no_grad():
        ratios = []
        for pair in PAIRS:
            for answer in (pair.chosen_ids, pair.rejected_ids):
                ids = torch.tensor([pair.prompt_ids + answer])
                now = model(input_ids=ids).logits.log_softmax(-1)
                with model.disable_adapter():
                    before = model(input_ids=ids).logits.log_softmax(-1)
                places = range(len(pair.prompt_ids), ids.shape[1])
                ratios.append(sum(float((now - before)[0, place - 1, ids[0, place]]) for place in places))
    margins = 0.1 * (torch.tensor(ratios[::2]) - torch.tensor(ratios[1::2]))
    wanted = float(-torch.nn.functional.logsigmoid(margins).mean())
    assert trained == pytest.approx(wanted, rel=1e-4)
    for at_once in (6, 4):
        figures = PairFigures(PAIRS, pad, beta=0.1).measure(model, evaluation(tmp_path, at_once), False, lambda: None)
        assert figures["eval_loss"] == pytest.approx(wanted, rel=1e-4)
        assert figures["eval_margin"] == pytest.approx(float(margins.mean()), rel=1e-3)
        assert figures["eval_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert log_probs(model, PAIRS, pad).shape == (2, 6)


def test_a_model_that_did_not_change_has_the_figures_of_no_change(trainer: Any, tmp_path: Path) -> None:
    from taskoffer_trainer.pair_figures import PairFigures

    figures = PairFigures(PAIRS, trainer.processing_class.pad_token_id, beta=0.1)
    with trainer.model.disable_adapter():
        found = figures.measure(trainer.model, evaluation(tmp_path), False, lambda: None)
        assert trainer.model.get_model_status().enabled is False
    # What is measured of the base model alone takes one pass, and the evaluations to come need no other of it.
    passes: list[int] = []
    hook = trainer.model.get_base_model().register_forward_pre_hook(lambda *_: passes.append(1))
    evaluate = evaluation(tmp_path, len(PAIRS))
    figures.measure(trainer.model, evaluate, False, lambda: None)
    again = PairFigures(PAIRS, trainer.processing_class.pad_token_id, beta=0.1)
    with trainer.model.disable_adapter():
        again.measure(trainer.model, evaluate, False, lambda: None)
    hook.remove()
    assert len(passes) == 2
    assert found == {
        "eval_loss": pytest.approx(0.6931471805599453),
        "eval_accuracy": 0.5,
        "eval_margin": 0,
        "eval_reward_chosen": 0,
        "eval_reward_rejected": 0,
    }


def test_an_adapter_that_changes_nothing_fails_verification(trainer: Any, tmp_path: Path) -> None:
    """As one whose weights were never stepped: B is still zero."""
    import torch

    from taskoffer_trainer.dpo import check_change
    from taskoffer_trainer.failures import TrainerError
    from taskoffer_trainer.pair_figures import PairFigures

    model, pad = trainer.model, trainer.processing_class.pad_token_id
    check_change(PairFigures(PAIRS, pad, beta=0.1).measure(model, evaluation(tmp_path), False, lambda: None))
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name in kept:
            model.get_parameter(name).zero_()
        figures = PairFigures(PAIRS, pad, beta=0.1).measure(model, evaluation(tmp_path), False, lambda: None)
        for name, parameter in kept.items():
            model.get_parameter(name).copy_(parameter)
    with pytest.raises(TrainerError, match="just what it says without it") as error:
        check_change(figures)
    assert error.value.code == 74


def test_the_library_knows_no_loss_that_is_neither_offered_nor_left_out_on_purpose(trainer: Any) -> None:
    import re

    from trl import DPOConfig

    trainer.loss_types, trainer.loss_weights = ["nonsense"], [1.0]
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        gradients(trainer, [PAIRS])
    known = set(re.findall(r"'(\w+)'", str(error.value)))
    assert known - set(DPOLossType) == {"aot", "aot_unpaired", "sft"}
    assert set(DPOLossType) <= known
    assert DPOConfig.__dataclass_fields__["beta"].default == 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lossType": "exo_pair"}, "labelSmoothing must be above 0 with lossType exo_pair"),
        ({"lossType": "robust", "labelSmoothing": 0.5}, "must be below 0.5 with lossType robust"),
        ({"lossType": "aot"}, "Input should be 'sigmoid'"),
        ({"beta": 0}, "greater than 0"),
    ],
)
def test_settings_that_a_loss_cannot_use_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSettings.model_validate(settings)

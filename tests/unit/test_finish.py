"""Whether a task is predicted to end in time, and what is said when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core_builders import cycle, offer, policy, policy_spec, spec_of
from taskoffer.api.grpo import GRPOSettings
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import GpuChoice
from taskoffer.api.v1alpha1.estimation import DurationEstimation
from taskoffer.api.v1alpha1.lanes import Lane, LaneRule
from taskoffer.decision import fit as fit_module
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.finish import duration_text
from taskoffer.decision.prediction import predict

LLAMA = {"model": "meta-llama/Meta-Llama-3-8B", "parameters": 8_030_000_000}


def estimating(*, counts: tuple[int, ...] = (1, 2, 4), gpus: int = 1, length: int = 2048, **duration: Any) -> Any:
    """Return a policy with one size class that trains with so many tokens, and predicts."""
    size = {
        "name": "All",
        "minParameters": 0,
        "gpus": gpus,
        "sizeEfficiency": "1",
        "lora": {"r": 64, "loraAlpha": 128},
        "train": {"maxLength": length, "perDeviceTrainBatchSize": 4, "numTrainEpochs": 3},
    }
    return policy_spec(
        size_classes=[size],
        resources=[{"name": "nvidia.com/gpu", "counts": list(counts)}],
        filters={"maxTimeLimitSeconds": 999_999, "minScore": "0"},
        estimation={"gpuMemory": "80G", "duration": {"tokensPerRow": 1024, **duration}},
    )


def test_ten_thousand_rows_three_times_on_one_gpu_take_the_known_time() -> None:
    found = predict(spec_of(**LLAMA, rows=10_000, hours=2), estimating(startSeconds=0, evaluationShare="0"), 1)
    assert found is not None
    assert found.finish is not None
    # The reference counts 7,300 tokens per second for this model and rank: 1.2 h.
    assert found.finish.training / 3600 == pytest.approx(1.17, abs=0.02)
    assert found.finish.start == 0
    assert found.finish.in_time


def test_start_evaluation_and_reserve_count_as_well() -> None:
    spec = spec_of(**LLAMA, rows=10_000, hours=2)
    bare = predict(spec, estimating(startSeconds=0, evaluationShare="0", reserveSeconds=0), 1)
    full = predict(spec, estimating(startSeconds=300, evaluationShare="0.1", reserveSeconds=600), 1)
    assert bare is not None
    assert full is not None
    assert bare.finish is not None
    assert full.finish is not None
    assert full.finish.seconds == pytest.approx(bare.finish.training * 1.1 + 300)
    assert full.finish.budget == 7200 - 600
    assert full.seconds == pytest.approx(full.finish.seconds + 600)


@pytest.mark.parametrize(
    ("changes", "rows", "length", "generated", "rounds", "compared", "basis"),
    [
        # Nothing is said, so the trainer's defaults count: 4 completions of each prompt, of 400 + 256 tokens, compared
        # with the base model; the 8 rows of a step are drawn at once.
        (None, 4000, 656, 256, 500, True, "of 400 tokens and 256 generated ones, 4 times, MFU"),
        ({}, 4000, 656, 256, 500, True, "of 400 tokens and 256 generated ones, 4 times, MFU"),
        # 8 completions of each prompt; 8 rows of a step are drawn at once, since up to 4 x 4 may be.
        ({"numGenerations": 8}, 8000, 656, 256, 1000, True, "and 256 generated ones, 8 times, MFU"),
        ({"numGenerations": 8, "beta": 0}, 8000, 656, 256, 1000, False, "and 256 generated ones, 8 times, MFU"),
        # Shorter completions than the policy assumes leave room for the whole prompt.
        ({"numGenerations": 2, "maxCompletionLength": 64}, 2000, 464, 64, 250, True, "and 64 generated ones, 2 times"),
        # Of 512 tokens in all, 400 may be of the completion: 112 are left for the prompt.
        ({"numGenerations": 2, "maxCompletionLength": 400}, 2000, 368, 256, 250, True, "of 112 tokens and 256"),
        # 8 rows of a step are rounded up to a group of 20, which takes two rounds of up to 16: 10 in the mean.
        ({"numGenerations": 20, "beta": 0}, 20_000, 656, 256, 2000, False, "20 times"),
    ],
)
def test_a_reinforcement_task_takes_what_drawing_and_training_its_completions_take(
    changes: dict[str, Any] | None, rows: int, length: int, generated: int, rounds: int, compared: bool, basis: str
) -> None:
    short = changes is not None and changes.get("maxCompletionLength") == 400
    chosen = estimating(
        length=512 if short else 2048, tokensPerRow=400, startSeconds=0, evaluationShare="0", reserveSeconds=0
    )
    size = chosen.size_classes[0]
    grpo = None if changes is None else GRPOSettings.model_validate(changes)
    train = size.train.model_copy(update={"grpo": grpo, "num_train_epochs": 1.0, "gradient_accumulation_steps": 2})
    spec_policy = chosen.model_copy(update={"size_classes": (size.model_copy(update={"train": train}),)})
    found = predict(spec_of(**LLAMA, task_type="GRPO", rows=1000, hours=900), spec_policy, 1)
    assert found is not None
    assert found.finish is not None
    # 8B at rank 64: 6,979,321,856 weights and 167,772,160 of the adapter, checkpointed; attention of 32 layers of 4096;
    # the head of 128,256 x 4096; 35 % of 989 teraflops. A token is drawn in 32 x 0.8 ms.
    weights, adapter = 6_979_321_856, 167_772_160
    per_token = (8 if compared else 6) * weights + 8 * adapter + 2 * length * 4096 * 32 * 4.5 + 6 * 128_256 * 4096
    trained = rows * length * per_token / (0.35 * 989e12)
    assert found.finish.training == pytest.approx(trained + rounds * generated * 32 * 0.8e-3, rel=1e-9)
    assert basis in found.finish.basis


@pytest.mark.parametrize(
    ("task", "rows", "tokens", "length", "basis"),
    [
        # Nothing is declared, so the policy's 1024 count.
        ("InstructText", 1000, None, 1024, "1000 rows, 3 epoch(s) of 1024 tokens, MFU 0.35"),
        ("InstructText", 1000, 1_500_000, 1500, "1000 rows, 3 epoch(s) of 1500 tokens (declared), MFU 0.35"),
        ("Chat", 3, 1000, 1000 / 3, "3 rows, 3 epoch(s) of 333.3 tokens (declared), MFU 0.35"),
        # The trainer cuts rows at maxLength, 2048.
        ("InstructText", 1000, 4_000_000, 2048, "1000 rows, 3 epoch(s) of 2048 tokens (4000 declared), MFU 0.35"),
        # No row is empty.
        ("InstructText", 1000, 10, 1, "1000 rows, 3 epoch(s) of 1 tokens (declared), MFU 0.35"),
        # Both of the two sequences of a pair are as long.
        ("DPO", 1000, 700_000, 700, "1000 rows, 3 epoch(s) of 700 tokens (declared), MFU 0.35"),
        # The declared tokens are the prompt's; its completions of 256 tokens leave it 1792.
        ("GRPO", 1000, 300_000, 556, "3 epoch(s) of 300 tokens (declared) and 256 generated ones, 4 times, MFU 0.35"),
        ("GRPO", 1000, 3_000_000, 2048, "of 1792 tokens (3000 declared) and 256 generated ones, 4 times, MFU 0.35"),
    ],
)
def test_rows_are_as_long_as_the_offer_declares_them(
    task: str, rows: int, tokens: int | None, length: float, basis: str
) -> None:
    spec = spec_of(**LLAMA, task_type=task, rows=rows, tokens=tokens, hours=900)
    found = predict(spec, estimating(startSeconds=0, evaluationShare="0", reserveSeconds=0), 1)
    assert found is not None
    assert found.finish is not None
    # 8B at rank 64: 6,979,321,856 weights and 167,772,160 of the adapter, checkpointed; attention of 32 layers of 4096;
    # the head of 128,256 x 4096; 35 % of 989 teraflops. Pairs and drawn rows are compared with the base model; a prompt
    # has 4 completions, and of 4 rows at a time each token is drawn in 32 x 0.8 ms.
    per_weight, sequences = (6, 1) if task in ("InstructText", "Chat") else (8, {"DPO": 2, "GRPO": 4}[task])
    per_token = per_weight * 6_979_321_856 + 8 * 167_772_160 + 2 * length * 4096 * 32 * 4.5 + 6 * 128_256 * 4096
    trained = 3 * rows * sequences * length * per_token / (0.35 * 989e12)
    drawn = 3 * rows * 256 * 32 * 0.8e-3 if task == "GRPO" else 0
    assert found.finish.training == pytest.approx(trained + drawn, rel=1e-9)
    assert basis in found.finish.basis


@given(
    st.sampled_from(["InstructText", "Chat", "DPO", "GRPO"]),
    st.integers(1, 10**6),
    st.tuples(st.integers(1, 10**10), st.integers(1, 10**10)),
    st.sampled_from([512, 2048, 16_384]),
)
@settings(max_examples=200, deadline=None)
def test_more_tokens_never_take_less_time(task: str, rows: int, tokens: tuple[int, int], length: int) -> None:
    chosen, took = estimating(length=length), []
    for declared in sorted(tokens):
        found = predict(spec_of(**LLAMA, task_type=task, rows=rows, tokens=declared, hours=900), chosen, 1)
        assert found is not None
        assert found.finish is not None
        took.append(found.finish.training)
    assert took[0] <= took[1]


def test_what_the_offer_declares_of_its_rows_decides_whether_it_ends_in_time() -> None:
    # 10,000 rows of 1024 tokens take 1.2 h, of 2000 twice as long.
    chosen, fields = estimating(), {**LLAMA, "rows": 10_000, "hours": 2, "gpus": 1}
    assert evaluate(spec_of(**fields), chosen).refusals == ()
    (refusal,) = evaluate(spec_of(**fields, tokens=20_000_000), chosen).refusals
    assert refusal.reason is Reason.CANNOT_FINISH_IN_TIME
    assert "10000 rows, 3 epoch(s) of 2000 tokens (declared), MFU 0.35" in refusal.message


def test_tokens_without_rows_predict_nothing_and_those_of_pictures_are_refused() -> None:
    silent = predict(spec_of(**LLAMA, rows=None, tokens=10**9, hours=0.1), estimating(), 1)
    assert silent is not None
    assert silent.finish is None
    with pytest.raises(ValidationError, match=r"dataset\.tokens counts text, and pictures have none: remove"):
        spec_of(task_type="Image", rows=20, tokens=1000)


def test_how_completions_are_drawn_counts_for_reinforcement_alone() -> None:
    chosen = estimating()
    size = chosen.size_classes[0]
    train = size.train.model_copy(update={"grpo": GRPOSettings(num_generations=64)})
    other = chosen.model_copy(update={"size_classes": (size.model_copy(update={"train": train}),)})
    for task in ("InstructText", "DPO"):
        spec = spec_of(**LLAMA, task_type=task, rows=1000, hours=900)
        one, two = predict(spec, chosen, 1), predict(spec, other, 1)
        assert one is not None
        assert two is not None
        assert (one.seconds, one.fit.peak) == (two.seconds, two.fit.peak)


def test_a_training_clock_does_not_count_the_start() -> None:
    chosen = estimating(startSeconds=3000, reserveSeconds=0)
    absolute, training = (
        predict(spec_of(**LLAMA, rows=100, hours=0.5, spec={"clockMode": mode}), chosen, 1)
        for mode in ("Absolute", "Training")
    )
    assert absolute is not None
    assert training is not None
    assert not absolute.holds
    assert training.holds
    assert absolute.seconds == training.seconds, "from the admission on it takes the same"


def test_without_bfloat16_it_takes_twice_as_long() -> None:
    base = estimating(startSeconds=0)
    size = base.size_classes[0]
    wide = base.model_copy(
        update={"size_classes": (size.model_copy(update={"train": size.train.model_copy(update={"bf16": False})}),)}
    )
    spec = spec_of(**LLAMA, rows=1000)
    slow, fast = predict(spec, wide, 1), predict(spec, base, 1)
    assert slow is not None
    assert fast is not None
    assert slow.seconds - 180 == pytest.approx(2 * (fast.seconds - 180))


@pytest.mark.parametrize("gpus", [2, 4])
def test_more_gpus_train_faster_and_start_no_sooner(gpus: int) -> None:
    spec, spec_policy = spec_of(**LLAMA, rows=10_000, hours=2), estimating()
    one, more = predict(spec, spec_policy, 1), predict(spec, spec_policy, gpus)
    assert one is not None
    assert more is not None
    assert one.finish is not None
    assert more.finish is not None
    assert more.finish.training == pytest.approx(one.finish.training / gpus)


def test_without_rows_nothing_is_predicted_and_nothing_refused() -> None:
    spec = spec_of(**LLAMA, rows=None, hours=0.1)
    found = predict(spec, estimating(), 1)
    assert found is not None
    assert found.finish is None
    assert evaluate(spec, estimating()).refusals == ()


def test_a_policy_without_an_estimation_predicts_nothing() -> None:
    assert predict(spec_of(**LLAMA, rows=10_000), policy_spec(), 1) is None


@pytest.mark.parametrize(
    ("limit_hours", "counts", "remedy"), [(0.6, (1, 2, 4), 4), (0.1, (1, 2, 4), None), (0.6, (1,), None)]
)
def test_a_refusal_names_what_would_have_been_enough_and_it_is_enough(
    limit_hours: float, counts: tuple[int, ...], remedy: int | None
) -> None:
    chosen = estimating(counts=counts)
    spec = spec_of(**LLAMA, rows=10_000, hours=limit_hours)
    (refusal,) = evaluate(spec, chosen).refusals
    assert refusal.reason is Reason.CANNOT_FINISH_IN_TIME
    assert ("gpuCount" in refusal.counterfactual) == (remedy is not None)
    if remedy is not None:
        assert f"accepted with gpuCount {remedy}" in refusal.counterfactual
        assert evaluate(spec.model_copy(update={"gpu_count": remedy}), chosen).refusals == ()
        assert evaluate(spec.model_copy(update={"gpu_count": remedy // 2}), chosen).refusals != ()
    seconds = int(refusal.counterfactual.rsplit(" ", 1)[-1])
    assert evaluate(spec.model_copy(update={"time_limit_seconds": seconds}), chosen).refusals == ()
    assert evaluate(spec.model_copy(update={"time_limit_seconds": seconds - 1}), chosen).refusals != ()


def test_a_remedy_is_one_that_lane_and_policy_take() -> None:
    base = estimating()
    lane = Lane(name="all", gpus=2, rules=(LaneRule(gpus_per_task=1),))
    bound = base.filters.model_copy(update={"max_time_limit_seconds": 3600})
    narrow = base.model_copy(update={"lanes": (lane,), "filters": bound})
    (refusal,) = evaluate(spec_of(**LLAMA, rows=10_000, hours=0.6), narrow).refusals
    assert refusal.counterfactual == "this filter passes with fewer rows or a smaller model"
    (refusal,) = evaluate(spec_of(**LLAMA, rows=4_000, hours=0.4), narrow).refusals
    assert refusal.counterfactual.startswith("accepted with gpuCount 2 or timeLimitSeconds of at least 2")


@pytest.fixture
def copies_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer that cannot share out a model's parameters."""
    monkeypatch.setattr(fit_module, "SHARDING_SERVED", False)
    fit_module.fit.cache_clear()
    yield
    fit_module.fit.cache_clear()


@pytest.mark.usefixtures("copies_only")
def test_fewer_gpus_are_a_remedy_where_copies_need_less_memory() -> None:
    spec = spec_of(model="x/llama", parameters=29_000_000_000, rows=10, gpus=2)
    (refusal,) = evaluate(spec, estimating()).refusals
    assert (refusal.reason, refusal.counterfactual) == (Reason.INSUFFICIENT_MEMORY, "accepted with gpuCount 1")
    assert evaluate(spec.model_copy(update={"gpu_count": 1}), estimating()).refusals == ()


def test_what_does_not_fit_is_not_also_too_slow() -> None:
    spec = spec_of(model="x/llama", parameters=70_000_000_000, rows=10_000_000, hours=1)
    assert [refusal.reason for refusal in evaluate(spec, estimating()).refusals] == [Reason.INSUFFICIENT_MEMORY]


@pytest.mark.parametrize(
    ("limit_hours", "gpus", "reasons"),
    [(3, 1, []), (1, 2, []), (0.6, 4, []), (0.1, 1, [Reason.CANNOT_FINISH_IN_TIME])],
)
def test_the_fewest_gpu_hours_that_end_in_time_are_chosen(limit_hours: float, gpus: int, reasons: list[Reason]) -> None:
    chosen = estimating().model_copy(update={"gpu_choice": GpuChoice.FEWEST_GPU_HOURS})
    found = evaluate(spec_of(**LLAMA, rows=10_000, hours=limit_hours), chosen)
    assert [refusal.reason for refusal in found.refusals] == reasons
    assert found.gpus == gpus


def test_what_the_offer_asks_for_and_what_nothing_is_known_of_is_not_chosen() -> None:
    chosen = estimating(gpus=2).model_copy(update={"gpu_choice": GpuChoice.FEWEST_GPU_HOURS})
    assert evaluate(spec_of(**LLAMA, rows=10_000, hours=3, gpus=4), chosen).gpus == 4
    assert evaluate(spec_of(**LLAMA, rows=None, hours=3), chosen).gpus == 2


def test_an_offer_waits_until_its_last_start_in_time_and_is_refused_then() -> None:
    chosen = policy(estimation={"gpuMemory": "80G", "duration": {"startSeconds": 600, "reserveSeconds": 60}})
    waiting = offer("late", spec={"deadline": "2026-01-31T12:30:00Z"}, rows=10)
    made = cycle([waiting], policies=[chosen], nodes=[])
    assert [d.answer.reason for d in made.decisions] == [Reason.INVENTORY_NOT_READY]
    assert made.wake_at is not None
    assert made.wake_at.isoformat().startswith("2026-01-31T12:18:5"), "11 minutes and a moment before the deadline"


def test_a_task_by_steps_is_predicted_without_rows() -> None:
    base = estimating()
    size = base.size_classes[0]
    by_steps = base.model_copy(
        update={"size_classes": (size.model_copy(update={"train": size.train.model_copy(update={"max_steps": 100})}),)}
    )
    found = predict(spec_of(**LLAMA, rows=None), by_steps, 2)
    assert found is not None
    assert found.finish is not None
    assert "100 steps of 8 rows of 1024 tokens" in found.finish.numbers


@pytest.mark.parametrize(
    ("mfu", "words"),
    [
        ([{"maxParameters": 10, "mfu": "0.3"}, {"maxParameters": 5, "mfu": "0.2"}], "must rise"),
        ([{"mfu": "0.3"}, {"maxParameters": 5, "mfu": "0.2"}], "only the last may be absent"),
        ([{"mfu": "1.1"}], "at most 1"),
        ([{"mfu": "0"}], "above 0"),
    ],
)
def test_a_table_of_shares_without_sense_is_refused(mfu: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DurationEstimation.model_validate({"mfu": mfu})


@pytest.mark.parametrize(
    ("parameters", "mfu"), [(10**9, "0.25"), (2 * 10**9, "0.35"), (32 * 10**9, "0.32"), (70 * 10**9, "0.30")]
)
def test_the_share_of_the_peak_depends_on_the_size(parameters: int, mfu: str) -> None:
    assert str(DurationEstimation().mfu_of(parameters)) == mfu


@pytest.mark.parametrize(
    ("seconds", "text"), [(90, "1.5 min"), (3600, "60 min"), (7200, "2 h"), (10_000, "2.78 h"), (31_536_000, "8760 h")]
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("units", [2, 4])
def test_a_unit_of_a_shared_gpu_has_its_share_of_memory_and_speed(units: int) -> None:
    offered = spec_of(model="meta-llama/Meta-Llama-3-8B", parameters=8_030_000_000, rows=10_000, hours=19)
    pool = {"name": "nvidia.com/gpu.shared", "counts": [1]}
    sizes = [{"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}]
    estimation = {"gpuMemory": "160G", "duration": {"peakTeraflops": 800}}
    shared = policy_spec(resources=[{**pool, "unitsPerGpu": units}], size_classes=sizes, estimation=estimation)
    smaller = {"gpuMemory": f"{160 // units}G", "duration": {"peakTeraflops": 800 // units}}
    whole = policy_spec(resources=[pool], size_classes=sizes, estimation=smaller)
    assert predict(offered, shared, 1) == predict(offered, whole, 1)


def test_several_units_of_a_shared_gpu_are_refused_for_they_may_be_parts_of_one() -> None:
    with pytest.raises(ValidationError, match="counts must be \\[1\\] with unitsPerGpu 2"):
        policy_spec(resources=[{"name": "nvidia.com/gpu.shared", "counts": [1, 2], "unitsPerGpu": 2}])


def test_fetching_before_and_uploading_after_count_on_the_absolute_clock_only() -> None:
    around = {"prepareSeconds": 300, "submitSeconds": 120}
    for mode, more in (("Absolute", 420), ("Training", 0)):
        offered = spec_of(**LLAMA, rows=10_000, hours=2, spec={"clockMode": mode})
        plain, stepped = predict(offered, estimating(), 1), predict(offered, estimating(**around), 1)
        assert plain is not None
        assert stepped is not None
        assert plain.finish is not None
        assert stepped.finish is not None
        assert stepped.finish.counted - plain.finish.counted == more
        assert stepped.finish.seconds - plain.finish.seconds == 420

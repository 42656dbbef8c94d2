"""Policies: their status, what lint finds, and the presets number by number."""

from decimal import Decimal
from typing import Any

import pytest

from core_builders import at, claim, node, policy, policy_spec, spec_of
from taskoffer import presets
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, CapacityPolicyStatus
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.ledger import Claim, NodeView, open_ledger
from taskoffer.decision.lint import lint, score_range
from taskoffer.decision.policy_status import PolicyFacts, policy_status
from taskoffer.decision.snapshot import PolicyView


def status(
    view: PolicyView | None = None,
    *,
    valid: bool = True,
    nodes: tuple[NodeView, ...] = (),
    claims: tuple[Claim, ...] = (),
    pending: int = 0,
    generation: int = 1,
    before: CapacityPolicyStatus | None = None,
    after: float = 0,
) -> CapacityPolicyStatus:
    return policy_status(
        PolicyFacts(
            now=at(after),
            policy=view or policy(),
            generation=generation,
            valid=valid,
            nodes=nodes or (node(),),
            ledger=open_ledger(claims),
            pending=pending,
            before=before or CapacityPolicyStatus(),
        )
    )


def said(made: CapacityPolicyStatus, kind: str) -> tuple[str, str, str]:
    found = next(c for c in made.conditions if c.type == kind)
    return found.status.value, found.reason, found.message


def test_a_valid_policy_is_in_force_and_its_spec_is_kept() -> None:
    made = status(generation=3, view=policy(generation=3))
    assert said(made, "Ready") == ("True", "Ready", "generation 3 is in force")
    assert (made.active_generation, made.observed_generation) == (3, 3)
    assert made.active_spec == policy_spec()


def test_an_invalid_change_keeps_the_last_good_version_in_force() -> None:
    good = policy(generation=2)
    broken = PolicyView(good.name, good.uid, 2, good.spec, problem="sizeClasses: order them")
    made = status(broken, valid=False, generation=3)
    assert said(made, "Ready") == (
        "False",
        "InvalidPolicy",
        "sizeClasses: order them; generation 2 stays in force",
    )
    assert (made.active_generation, made.observed_generation) == (2, 3)
    assert made.active_spec == good.spec


def test_a_policy_that_was_never_valid_says_what_to_do() -> None:
    made = status(PolicyView("lab", "u", 1, None, problem="filters: nonsense"), valid=False)
    assert said(made, "Ready")[2] == "filters: nonsense; no valid version is known: mend spec"
    assert (made.active_spec, made.active_generation, made.lint) == (None, None, ())


def test_capacity_counts_ready_nodes_and_shows_all() -> None:
    made = status(
        nodes=(node("n2", 8), node("n1", 4, ready=False), node("idle", 0), node("ghost", 0)),
        claims=(claim("a", "n2", 2), claim("b", "n1", 4), claim("c", "ghost", 1)),
        pending=5,
    )
    assert made.capacity is not None
    assert made.capacity.to_wire() == {
        "total": 8,
        "used": 3,
        "pending": 5,
        "running": 3,
        "nodes": [
            {"name": "ghost", "allocatable": 0, "booked": 1, "ready": True},
            {"name": "n1", "allocatable": 4, "booked": 4, "ready": False},
            {"name": "n2", "allocatable": 8, "booked": 2, "ready": True},
        ],
    }


def test_a_node_that_offers_less_than_is_booked_is_reported_until_it_fits_again() -> None:
    short = status(nodes=(node("n1", 2),), claims=(claim("a", "n1", 4),))
    assert said(short, "CapacityConsistent") == (
        "False",
        "AllocatableBelowBooked",
        "n1 offers 2 and 4 are booked; nothing more is admitted there until enough has ended",
    )
    fine = status(nodes=(node("n1", 4),), claims=(claim("a", "n1", 4),), before=short, after=9)
    assert said(fine, "CapacityConsistent")[0] == "True"


def test_a_policy_without_findings_says_so_and_one_with_findings_names_the_first() -> None:
    clean = policy(filters={"minScore": "0.6", "maxConcurrentJobs": 8})
    assert said(status(clean), "Linted") == ("True", "NoFindings", "no findings")
    assert said(status(), "Linted")[:2] == ("False", "LintFindings")
    assert said(status(), "Linted")[2].startswith("2 finding(s), the first: filters.minScore: 0.45 rejects nothing")


def test_a_status_that_is_right_stays_the_same() -> None:
    first = status()
    assert status(before=first, after=60) == first


# Lint


MIN_SCORE = "filters.minScore: 0.45 rejects nothing: scores of accepted offers run from "
_ASKED_TOO_MUCH = [
    (
        "sizeClasses[Small].lora.r",
        "Warning",
        "410 for GRPO is more than layers of a usual 1B model hold: q/o 384, k/v 173",
    ),
    ("sizeClasses[Medium].lora.r", "Warning", "819 for GRPO is more than layers of a usual 7B model hold: k/v 357"),
    (
        "sizeClasses[Large].lora.r",
        "Warning",
        "1638 for GRPO is more than layers of a usual 13B model hold: q/o 1136, k/v 438",
    ),
    (
        "sizeClasses[Large].gpus",
        "Warning",
        "models above about 43.5B do not fit 2 GPU(s) with InstructText and are refused",
    ),
    ("sizeClasses[Large].gpus", "Warning", "models above about 43.5B do not fit 2 GPU(s) with GRPO and are refused"),
    (
        "sizeClasses[XLarge].lora.r",
        "Warning",
        "3277 for GRPO is more than layers of a usual 70B model hold: q/o 2288, k/v 815",
    ),
    (
        "sizeClasses[XLarge].gpus",
        "Error",
        "no usual model of the class fits 2 GPU(s), not even with one row at a time and a small rank",
    ),
]
PRESSURE = (
    "estimation.memoryFraction",
    "Warning",
    "estimation.memoryFraction: 0.90 lets a job start at the mark of memory pressure, 0.90, at which a running job has "
    "to give way: plan with less, as 0.85",
)
PROFILES = [(field, severity, f"{field}: {text}") for field, severity, text in _ASKED_TOO_MUCH]
"""What the profiles of the 8xH100 document ask for and no GPU can give."""
NO_SCORE: dict[str, Any] = {"filters": {"minScore": None, "maxConcurrentJobs": None}}
FINDINGS: list[tuple[str, dict[str, Any], tuple[NodeView, ...], list[tuple[str, str, str]]]] = [
    (
        "preemption without predictions, an idle price, and a lower priority that stops a higher one",
        {
            "queue": {"priorities": ["low", "high"]},
            "preemption": {"rules": [{"by": ["low"], "of": ["high"]}], "gpuHourPrice": "1"},
        },
        (),
        [
            ("filters.minScore", "Warning", MIN_SCORE + "0.5000 to 0.7400"),
            (
                "preemption",
                "Warning",
                "preemption: stops no job before its trainer reports: without estimation.duration a job counts as "
                "taking all of its time, and would be late; set it",
            ),
            (
                "preemption.gpuHourPrice",
                "Info",
                "preemption.gpuHourPrice: counts with gainFactor only: set that, or remove it",
            ),
            (
                "preemption.rules[0]",
                "Warning",
                "preemption.rules[0]: low stops high, which comes before it in the queue and takes its GPUs back",
            ),
        ],
    ),
    (
        "the 8xH100 preset on its machine",
        {"preset": "strategy-8xh100"},
        (node(),),
        [
            ("filters.minScore", "Warning", MIN_SCORE + "0.5075 to 0.7400"),
            (
                "filters.maxConcurrentJobs",
                "Warning",
                "filters.maxConcurrentJobs: 12 never binds: with whole GPUs at most 5 jobs run at a time",
            ),
            PRESSURE,
            *PROFILES,
        ],
    ),
    (
        "the 8xH100 preset on half a machine",
        {"preset": "strategy-8xh100", "filters": {"minScore": "0.6", "maxConcurrentJobs": 5}},
        (node(gpus=4),),
        [("lanes", "Warning", "lanes: the lanes hand out 8 GPUs and the selected nodes offer 4"), PRESSURE, *PROFILES],
    ),
    (
        "the lab preset without nodes",
        {"preset": "lab"},
        (),
        [("filters.minScore", "Warning", MIN_SCORE + "0.5000 to 0.7400")],
    ),
    (
        "the lab preset on one node",
        {"preset": "lab"},
        (node(),),
        [
            ("filters.minScore", "Warning", MIN_SCORE + "0.5000 to 0.7400"),
            (
                "filters.maxConcurrentJobs",
                "Warning",
                "filters.maxConcurrentJobs: 12 never binds: with whole GPUs at most 8 jobs run at a time",
            ),
        ],
    ),
    (
        "a threshold that nothing passes",
        {"filters": {"minScore": "0.74"}},
        (),
        [("filters.minScore", "Error", "filters.minScore: 0.74 rejects everything: scores end at 0.7400")],
    ),
    (
        "a cap below the threshold",
        {"filters": {"minScore": "0.6"}, "scoring": {"cap": "0.6"}},
        (),
        [("filters.minScore", "Error", "filters.minScore: 0.6 rejects everything: scores end at 0.6")],
    ),
    (
        "a cap that all offers reach",
        {"filters": {"minScore": "0.05"}, "scoring": {"cap": "0.1"}},
        (),
        [
            (
                "filters.minScore",
                "Warning",
                "filters.minScore: 0.05 rejects nothing: scores of accepted offers run from 0.1 to 0.1 (0.5000 to "
                "0.7400 before the cap)",
            ),
            ("scoring", "Warning", "scoring: every accepted offer scores 0.1: the score orders nothing"),
        ],
    ),
    (
        "weights that do not sum to 1",
        {
            **NO_SCORE,
            "scoring": {"terms": [{"name": "TaskWeight", "weight": "0.4"}, {"name": "Bonus", "weight": "0.7"}]},
        },
        (),
        [("scoring.terms", "Info", "scoring.terms: the weights sum to 1.1, not to 1")],
    ),
    (
        "a table whose lowest value is above the threshold",
        {
            "filters": {"minScore": "0.2"},
            "scoring": {
                "terms": [
                    {"name": "TimeEfficiency", "weight": "1", "table": [{"below": "2", "value": "1"}, {"value": "0.3"}]}
                ]
            },
        },
        (),
        [("filters.minScore", "Warning", MIN_SCORE.replace("0.45", "0.2") + "0.3 to 1")],
    ),
    (
        "a table that ends",
        {
            "filters": {"minScore": "1"},
            "scoring": {"terms": [{"name": "TimeEfficiency", "weight": "1", "table": [{"below": "2", "value": "1"}]}]},
        },
        (),
        [("filters.minScore", "Error", "filters.minScore: 1 rejects everything: scores end at 1")],
    ),
    (
        "lanes that overlap",
        {
            **NO_SCORE,
            "lanes": [
                {"name": "text", "gpus": 4, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}]},
                {"name": "all", "gpus": 4, "rules": [{"gpusPerTask": 1}]},
                {"name": "dpo", "gpus": 1, "rules": [{"taskTypes": ["DPO"], "gpusPerTask": 1}]},
            ],
        },
        (),
        [
            (
                "lanes[all]",
                "Warning",
                "lanes[all]: overlaps with text: 6 kind(s) of task fit both, the first lane counts",
            ),
            (
                "lanes[dpo]",
                "Error",
                "lanes[dpo]: overlaps with text: 1 kind(s) of task fit both, so that nothing reaches it",
            ),
            (
                "lanes[dpo]",
                "Error",
                "lanes[dpo]: overlaps with all: 2 kind(s) of task fit both, so that nothing reaches it",
            ),
        ],
    ),
    (
        "lanes that leave GPUs over",
        {**NO_SCORE, "lanes": [{"name": "all", "gpus": 6, "rules": [{"gpusPerTask": 1}]}]},
        (node(),),
        [("lanes", "Warning", "lanes: the lanes hand out 6 of the 8 GPUs that the selected nodes offer")],
    ),
    (
        "limits that never bind",
        {
            "filters": {"minScore": None, "maxConcurrentJobs": None, "maxTimeLimitSeconds": 99_999_999},
            "namespaces": [{"name": "a", "gpus": 8}, {"name": "b", "gpus": 7}],
            "queue": {"raiseAfterSeconds": 60, "reserveFromGpus": 8},
            "task_types": [
                {"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1", "dailyFloor": 2}
            ],
        },
        (node(),),
        [
            (
                "filters.maxTimeLimitSeconds",
                "Warning",
                "filters.maxTimeLimitSeconds: 99999999 never binds: no offer can ask for more than 31536000",
            ),
            ("namespaces[a].gpus", "Warning", "namespaces[a].gpus: 8 never binds: the nodes offer 8"),
            (
                "taskTypes[InstructText].dailyFloor",
                "Warning",
                "taskTypes[InstructText].dailyFloor: relaxes nothing: there is no filters.minScore to relax",
            ),
            (
                "queue.raiseAfterSeconds",
                "Warning",
                "queue.raiseAfterSeconds: raises nothing: there are no two priorities",
            ),
            (
                "queue.reserveFromGpus",
                "Warning",
                "queue.reserveFromGpus: 8 keeps no node: tasks get at most 4 GPUs",
            ),
            (
                "queue.reserveFromGpus",
                "Warning",
                "queue.reserveFromGpus: keeps nodes only: in a lane or under a namespace's quota smaller offers may "
                "still take what a large one waits for",
            ),
        ],
    ),
    (
        "a queue where nothing waits",
        {"filters": {"minScore": None, "maxConcurrentJobs": None, "onFull": "Reject"}, "queue": {}},
        (),
        [("queue", "Info", "queue: orders nothing that waits: filters.onFull is Reject")],
    ),
    (
        "more GPUs than any node has",
        NO_SCORE,
        (node(gpus=2),),
        [("resources[0].counts", "Warning", "resources[0].counts: 4 GPUs are on no Ready node; the largest has 2")],
    ),
    (
        "trainers that everybody has, and that nobody has",
        {
            **NO_SCORE,
            "steps": {"cache": {"claimName": "cache"}, "submitSeconds": 0},
            "trainers": {
                "images": ["**", "reg*.example.com/x:1", "mine*", "registry.example.com/a b", "registry.example.com/*"],
                "repositories": [
                    "https://git.example.com",
                    "http://git.example.com/team/",
                    "https://git.example.com/../team",
                    "https://git.example.com/team",
                ],
            },
        },
        (),
        [
            (
                "trainers.images[0]",
                "Warning",
                "trainers.images[0]: ** allows every image of every registry: name the registry, as "
                "registry.example.com/*",
            ),
            (
                "trainers.images[1]",
                "Warning",
                "trainers.images[1]: reg*.example.com/x:1 has a wildcard in the registry's name, where anybody can "
                "have one that matches it",
            ),
            (
                "trainers.images[2]",
                "Warning",
                "trainers.images[2]: mine* has a wildcard in the registry's name, where anybody can have one that "
                "matches it",
            ),
            (
                "trainers.images[3]",
                "Warning",
                "trainers.images[3]: 'registry.example.com/a b' matches nothing: no image reference has blanks in it",
            ),
            (
                "trainers.repositories[0]",
                "Warning",
                "trainers.repositories[0]: https://git.example.com allows every repository of its host, whoever owns "
                "it: name an owner, as https://git.example.com/team/",
            ),
            (
                "trainers.repositories[1]",
                "Warning",
                "trainers.repositories[1]: http://git.example.com/team/ matches nothing: steps.network.allowHttp is "
                "false; write https://",
            ),
            (
                "trainers.repositories[2]",
                "Warning",
                "trainers.repositories[2]: https://git.example.com/../team matches nothing: no part of a repository's "
                "address may begin with a dot",
            ),
            (
                "steps.submitSeconds",
                "Warning",
                "steps.submitSeconds: 0 leaves no time to verify what another's trainer has left: one that is stopped "
                "when its time is over has missed its deadline; set it",
            ),
        ],
    ),
    (
        "results that are tried where their models do not fit",
        {
            **NO_SCORE,
            "steps": {"cache": {"claimName": "cache"}, "memory": "4Mi"},
            "trainers": {"images": ["registry.example.com/*"]},
        },
        (),
        [
            (
                "steps.memory",
                "Warning",
                "steps.memory: 4Mi holds no model of sizeClasses[Large], from 3M parameters (0.006 GB): a result of "
                "another's trainer is tried on its base model there",
            ),
        ],
    ),
    (
        "the best adapter so far, which no time is left for and which is tried where its model does not fit",
        {**NO_SCORE, "steps": {"cache": {"claimName": "cache"}, "memory": "4Mi", "submitSeconds": 0}},
        (),
        [
            (
                "steps.submitSeconds",
                "Warning",
                "steps.submitSeconds: 0 leaves no time to hand over the best adapter so far: a training that is "
                "stopped when its time is over has missed its deadline; set it",
            ),
            (
                "steps.memory",
                "Warning",
                "steps.memory: 4Mi holds no model of sizeClasses[Large], from 3M parameters (0.006 GB): the best "
                "adapter so far, which is handed over when time or attempts run out, is tried on its base model there; "
                "give it more",
            ),
        ],
    ),
    (
        "steps with time and memory for every model",
        {**NO_SCORE, "steps": {"cache": {"claimName": "cache"}, "memory": "8Mi", "submitSeconds": 1}},
        (),
        [],
    ),
    ("steps without a limit", {**NO_SCORE, "steps": {"cache": {"claimName": "cache"}}}, (), []),
    (
        "trainers that are no trainers",
        {**NO_SCORE, "steps": {"cache": {"claimName": "cache"}}, "trainers": {"image": "python:3.13"}},
        (),
        [
            ("trainers", "Warning", "trainers: allows no trainer: list images or repositories, or remove it"),
            (
                "trainers.image",
                "Info",
                "trainers.image: is never used: only repositories run in it, and none is allowed",
            ),
        ],
    ),
    ("no bounds at all", {"filters": {"minScore": None, "maxConcurrentJobs": None}}, (node(),), []),
]


@pytest.mark.parametrize(("fields", "nodes", "wanted"), [c[1:] for c in FINDINGS], ids=[c[0] for c in FINDINGS])
def test_lint(fields: dict[str, Any], nodes: tuple[NodeView, ...], wanted: list[tuple[str, str, str]]) -> None:
    assert [(f.field, f.severity, f.message) for f in lint(policy_spec(**fields), nodes)] == wanted


def test_trainers_of_others_need_the_steps_that_verify_their_results() -> None:
    with pytest.raises(ValueError, match=r"trainers needs steps, .*: set steps or remove trainers"):
        policy_spec(trainers={"images": ["registry.example.com/*"]})


def test_the_score_range_counts_unknown_families_and_the_cap() -> None:
    assert score_range(policy_spec(preset="strategy-8xh100")) == (Decimal("0.5075"), Decimal("0.7400"))
    low, _ = score_range(policy_spec(preset="strategy-8xh100", filters={"unknownFamily": "0"}))
    assert low == Decimal("0.5075") - Decimal("0.25") * Decimal("0.75")
    assert score_range(policy_spec(scoring={"cap": "0.1"})) == (Decimal("0.1"), Decimal("0.1"))


def test_without_a_longest_time_limit_the_score_range_has_full_time_efficiency_as_every_score_does() -> None:
    spec = policy_spec(preset="strategy-8xh100", filters={"maxTimeLimitSeconds": None, "minScore": "0.55"})
    assert score_range(spec) == (Decimal("0.6075"), Decimal("0.7400"))
    (found,) = [finding.message for finding in lint(spec) if finding.field == "filters.minScore"]
    assert found == "filters.minScore: 0.55 rejects nothing: scores of accepted offers run from 0.6075 to 0.7400"
    lowest = spec_of(model="x/phi-4", task_type="Image", parameters=100_000_000_000, hours=700)
    score = evaluate(lowest, spec).score
    assert score is not None
    assert score.total == Decimal("0.6075")


# Presets


@pytest.fixture(scope="module")
def h100() -> CapacityPolicySpec:
    return CapacityPolicySpec.model_validate(presets.load("strategy-8xh100")["spec"])


def test_the_h100_preset_scores_with_the_documents_weights(h100: CapacityPolicySpec) -> None:
    assert {t.name.value: t.weight for t in h100.scoring.terms} == {
        "TaskWeight": "0.35",
        "ModelPerformance": "0.25",
        "TaskSuccessRate": "0.20",
        "TimeEfficiency": "0.10",
        "SizeEfficiency": "0.05",
        "Bonus": "0.05",
    }
    assert sum(Decimal(t.weight) for t in h100.scoring.terms) == 1


def test_the_h100_preset_holds_the_documents_task_types(h100: CapacityPolicySpec) -> None:
    found = {t.name.value: (t.accepted, t.weight, t.lora_rank_factor, t.learning_rate_factor) for t in h100.task_types}
    assert found == {
        "InstructText": (True, "0.35", "1.4", "1.2"),
        "GRPO": (True, "0.30", "1.6", "0.85"),
        "Image": (True, "0.20", "1.5", "1.15"),
        "DPO": (False, "0.15", None, None),
        "Chat": (False, "0", None, None),
    }


def test_the_h100_preset_holds_the_documents_families(h100: CapacityPolicySpec) -> None:
    assert {f.name: f.success_rate for f in h100.families} == {
        "Llama": "0.95",
        "Mistral": "0.90",
        "Qwen": "0.85",
        "Gemma": "0.80",
        "Phi": "0.75",
        "CodeLlama": "0.90",
        "DeepSeek": "0.85",
        # The document's image models, of which it gives no rate.
        "SDXL": "0.75",
        "Flux": "0.75",
    }


def test_the_h100_preset_holds_the_documents_acceptance_criteria(h100: CapacityPolicySpec) -> None:
    assert h100.filters.max_time_limit_seconds == 20 * 3600
    assert h100.filters.min_score == "0.45"
    assert h100.filters.max_concurrent_jobs == 12
    assert h100.filters.unknown_family is None
    assert h100.filters.unknown_parameters is None


BILLION = 10**9
SIZE_CLASSES = [
    ("Small", 0, 7 * BILLION, 256, 64, 0.05, 4e-4, 16, 1),
    ("Medium", 7 * BILLION, 13 * BILLION, 512, 128, 0.1, 3e-4, 8, 2),
    ("Large", 13 * BILLION, 70 * BILLION, 1024, 256, 0.15, 2e-4, 4, 4),
    ("XLarge", 70 * BILLION, None, 2048, 512, 0.2, 1e-4, 2, 8),
]


def test_the_h100_preset_holds_the_documents_lora_table(h100: CapacityPolicySpec) -> None:
    found = [
        (
            s.name,
            s.min_parameters,
            s.max_parameters,
            s.lora.r,
            s.lora.lora_alpha,
            s.lora.lora_dropout,
            s.train.learning_rate,
            s.train.per_device_train_batch_size,
            s.train.gradient_accumulation_steps,
        )
        for s in h100.size_classes
    ]
    assert found == SIZE_CLASSES


def test_the_h100_preset_trains_as_the_document_says(h100: CapacityPolicySpec) -> None:
    for size in h100.size_classes:
        train = size.train
        assert (train.eval_steps, train.save_total_limit, train.max_length) == (25, 8, 8192)
        assert (train.bf16, train.torch_compile, train.gradient_checkpointing) == (True, True, True)
        assert (train.dataloader_num_workers, train.group_by_length) == (16, True)


def test_the_h100_preset_has_the_documents_lanes(h100: CapacityPolicySpec) -> None:
    assert [(lane.name, lane.gpus) for lane in h100.lanes] == [
        ("small-text", 2),
        ("medium-text", 2),
        ("large-text", 2),
        ("xlarge-text-and-image", 2),
    ]
    assert sum(lane.gpus for lane in h100.lanes) == 8
    per_task = [[r.gpus_per_task for r in lane.rules] for lane in h100.lanes]
    assert per_task == [[2], [2], [2], [2, 1, 1]]
    assert [a.value for r in h100.lanes[-1].rules for a in r.architectures] == ["sdxl", "flux"]


def test_the_lab_preset_has_the_first_documents_weights_no_lanes_and_takes_every_type(h100: CapacityPolicySpec) -> None:
    manifest = presets.load("lab", image="registry.test/trainer:2")
    lab = CapacityPolicySpec.model_validate(manifest["spec"])
    assert (lab.scoring, lab.filters) == (h100.scoring, h100.filters)
    pictures = ("SDXL", "Flux")
    assert {f for f in lab.families if f.name not in pictures} == {f for f in h100.families if f.name not in pictures}
    assert {f.name for f in lab.families} >= set(pictures)
    assert lab.lanes == ()
    assert all(t.accepted for t in lab.task_types)
    assert {s.gpus for s in lab.size_classes} == {1, 2, 4}
    assert lab.pod_template.image == "registry.test/trainer:2"
    assert manifest["metadata"]["annotations"] == {"taskoffer.dev/is-default-policy": "true"}


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    assert {"strategy-8xh100", "strategy-maximum-accuracy", "balanced-4", "market-table", "expected-value"} < set(
        presets.names()
    )
    with pytest.raises(KeyError, match="no preset 'nope'; there are balanced-4, expected-value, lab, "):
        presets.load("nope")


def test_a_size_class_of_the_tiniest_models_is_looked_at_as_well() -> None:
    tiny = {"name": "T", "minParameters": 0, "maxParameters": 1, "gpus": 1, "sizeEfficiency": "1"}
    spec = policy_spec(size_classes=[{**tiny, "lora": {}, "train": {"maxSteps": 40}}], estimation={"gpuMemory": "80G"})
    assert [f.field for f in lint(spec)] == ["filters.minScore"]


def test_a_finding_about_a_field_with_a_very_long_name_can_be_stored() -> None:
    spec = policy_spec(namespaces=[{"name": "n" * 253, "gpus": 99}])
    (found,) = [f for f in lint(spec, (node(),)) if f.field.startswith("namespaces")]
    assert len(found.field) == 253

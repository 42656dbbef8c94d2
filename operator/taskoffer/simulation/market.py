"""Traces of a task market, drawn at random from a seed.

Published rules of the market that the strategy documents were written for (Bittensor's subnet 56), as the constants of
its validator have had them (``rayonlabs/G.O.D`` until 2025, ``gradients-ai/G.O.D`` in 2026):

* task types: instruct 40 % of which half chat, image 20 %, DPO 15 %, GRPO 25 % (2025);
* model sizes: 0.1 to 12 B, with a chance of 5 % 12 to 71 B (2025);
* rows of text: 8,000 to 175,000 (2026); of pictures: 10 to 50 pairs;
* time limits (2026): from throughput for text (:func:`time_limit`), from a table for GRPO, 0.5 to 1 h for images;
* GPUs of a task: a table of the size times what the task type needs (:func:`market_gpus`);
* worth: 2 * sqrt(hours * billions), the size taken as 1 to 40 B, times the weight of the task type (July 2025).

Nobody has published the following, so it is **assumed here**: how rows spread between their bounds (evenly in their
logarithm) and how many a GRPO task has; which models are offered (well-known ones, each as likely as the next; a fifth
with a name that says nothing, as the market does since it anonymises models); that offers come in bursts (a Poisson
process that switches between a calm and a busy rate); how long an offer waits for an answer; how far a real duration is
from the predicted one; how often a job fails for reasons of its own; the shares of the priority classes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.sizing import parameters_of
from taskoffer.simulation.trace import Header, Trace, TraceOffer, Truth
from taskoffer.simulation.truth import REFERENCE_SETTINGS, duration_of

_T = TypeVar("_T")
_HOUR = 3600.0
_TYPES = {
    TaskType.INSTRUCT_TEXT: 0.20,
    TaskType.CHAT: 0.20,
    TaskType.DPO: 0.15,
    TaskType.GRPO: 0.25,
    TaskType.IMAGE: 0.20,
}
_WEIGHTS = {
    TaskType.INSTRUCT_TEXT: 0.35,
    TaskType.CHAT: 0.35,
    TaskType.DPO: 0.15,
    TaskType.GRPO: 0.30,
    TaskType.IMAGE: 0.20,
}
_SIZE_FACTORS = {TaskType.DPO: 3.0, TaskType.GRPO: 2.0}
"""What a task type needs as a multiple of the model's size, when GPUs are chosen."""
_GPU_TABLE = ((4.0, 1), (12.0, 2), (40.0, 4), (math.inf, 8))
_GRPO_HOURS = ((4.0, 1.5), (12.0, 2.5), (40.0, 4.0), (math.inf, 6.0))
_IMAGE_HOURS = (0.5, 0.75, 1.0)
_TEXT_ROWS = (8_000, 175_000)
_GRPO_ROWS = (500, 8_000)
_PICTURES = (10, 50)
_REPEATS = 100
"""How often the market's trainer shows each picture: 10 repeats in 10 epochs."""
_MOST_PICTURES = {Architecture.SDXL: 6_400, Architecture.FLUX: 3_000}
"""Its bound on pictures in all: 1,600 steps of 4, 3,000 steps of 1."""
_PRIORITIES = {"organic": 0.2, "tournament": 0.6, "benchmark": 0.2}

_MODELS = {
    "HuggingFaceTB/SmolLM2-135M": 0.135,
    "HuggingFaceTB/SmolLM2-360M": 0.362,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.1,
    "meta-llama/Llama-3.2-1B": 1.236,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "google/gemma-2-2b": 2.614,
    "microsoft/phi-2": 2.78,
    "Qwen/Qwen2.5-3B": 3.086,
    "meta-llama/Llama-3.2-3B": 3.213,
    "microsoft/Phi-3.5-mini-instruct": 3.821,
    "codellama/CodeLlama-7b-hf": 6.739,
    "deepseek-ai/deepseek-llm-7b-base": 6.91,
    "tiiuae/falcon-7b": 7.217,
    "mistralai/Mistral-7B-v0.3": 7.248,
    "Qwen/Qwen2.5-7B": 7.616,
    "meta-llama/Llama-3.1-8B": 8.03,
    "google/gemma-7b": 8.538,
    "01-ai/Yi-1.5-9B": 8.829,
    "google/gemma-2-9b": 9.242,
    "upstage/SOLAR-10.7B-v1.0": 10.732,
}
"""Models and their billions of parameters, as their publishers state them."""
_BIG_MODELS = {
    "codellama/CodeLlama-13b-hf": 13.016,
    "microsoft/phi-4": 14.66,
    "Qwen/Qwen2.5-14B": 14.77,
    "google/gemma-2-27b": 27.227,
    "Qwen/Qwen2.5-32B": 32.764,
    "01-ai/Yi-1.5-34B": 34.389,
    "mistralai/Mixtral-8x7B-v0.1": 46.703,
    "meta-llama/Llama-3.1-70B": 70.554,
}
_IMAGE_MODELS = {
    Architecture.SDXL: ("stabilityai/stable-diffusion-xl-base-1.0", 2.567),
    Architecture.FLUX: ("black-forest-labs/FLUX.1-dev", 11.901),
}
_DATASETS: dict[TaskType, dict[str, Any]] = {
    TaskType.INSTRUCT_TEXT: {"type": "Instruct", "instruct": {"fieldOutput": "output"}},
    TaskType.CHAT: {"type": "Chat", "chat": {}},
    TaskType.DPO: {"type": "DPO", "dpo": {}},
    TaskType.GRPO: {
        "type": "GRPO",
        "grpo": {
            "rewardFunctions": [
                {
                    "name": "length",
                    "source": "def length(completions, **_):\n    return [len(c) for c in completions]\n",
                }
            ]
        },
    },
    TaskType.IMAGE: {"type": "Image", "image": {"resolution": 1024}},
}


@dataclass(frozen=True, slots=True)
class Market:
    """The numbers of the market that are not published rules. Rates are offers per unit of time.

    Only the ratio of the rates to each other and to the spells counts: a trace is stretched to the load that is asked.
    """

    big_share: float = 0.05
    """Chance of a model above 12 B. Published."""
    anonymous_share: float = 0.20
    calm_rate: float = 1.0
    busy_rate: float = 12.0
    calm_spell: float = 6.0
    """Mean length of a calm spell."""
    busy_spell: float = 1.0
    patience_median: float = 1800.0
    """Seconds: the market asks again after 15 minutes, six times at most."""
    patience_sigma: float = 1.0
    patience_bounds: tuple[float, float] = (60.0, 6 * _HOUR)
    duration_sigma: float = 0.20
    """Of the logarithm of real over predicted duration; its median is 1."""
    failure_share: float = 0.05


def generate(seed: int, load: float, count: int, *, gpus: int = 8, market: Market | None = None) -> Trace:
    """Draw a trace.

    The same seed gives the same offers for every load; only their distances in time differ.

    Args:
        seed: Of the random numbers.
        load: Offered load, exactly: GPU-seconds that the offers need with the market's number of GPUs, over the
            GPU-seconds that there are until the last arrival.
        count: Number of offers, at least 1.
        gpus: GPUs that the load refers to.
        market: The assumptions; absent takes the defaults.

    Raises:
        ValueError: when load or count is not positive.
    """
    if count < 1:
        raise ValueError(f"a trace has at least one offer, got {count}")
    if not 0 < load < math.inf:
        raise ValueError(f"the load must be above 0, got {load}")
    numbers, market = random.Random(seed), market or Market()
    offers = [_offer(number, numbers, market) for number in range(count)]
    arrivals = _arrivals(count, numbers, market)
    seconds = sum(map(demand_of, offers)) / (gpus * load)
    stretch = seconds / arrivals[-1]
    header = Header(seed=seed, load=load, offers=count, gpus=gpus, seconds=seconds)
    return Trace(header, tuple(replace(one, at=at * stretch) for one, at in zip(offers, arrivals, strict=True)))


def offered_load(trace: Trace) -> float:
    """Return the GPU-seconds that a trace's offers need over those that its GPUs have until its end; 0 if empty."""
    if trace.seconds == 0:
        return 0.0
    return sum(map(demand_of, trace.offers)) / (trace.header.gpus * trace.seconds)


def demand_of(offer: TraceOffer) -> float:
    """Return the GPU-seconds that an offer really takes on the market's number of GPUs, whether or not it fits them."""
    parameters = parameters_of(offer.spec.model, None) or 0
    gpus = market_gpus(offer.spec.task_type, parameters / 1e9)
    return gpus * duration_of(offer, REFERENCE_SETTINGS, gpus)


def market_gpus(task: TaskType, billions: float) -> int:
    """Return how many H100 the market gives a task: by its size, which counts three times for DPO, twice for GRPO."""
    if task is TaskType.IMAGE:
        return 1
    effective = billions * _SIZE_FACTORS.get(task, 1.0)
    return next(gpus for most, gpus in _GPU_TABLE if effective <= most)


def time_limit(task: TaskType, billions: float, rows: int) -> float:
    """Return the hours that the market gives a text or GRPO task.

    Two passes over rows of 400 tokens at 6 FLOPs per parameter, on GPUs that reach 15 % of an H100's 989 TFLOP/s, 1.4
    times that for DPO, and 0.75 h; rounded up to quarters of an hour, from 0.75 to 5. GRPO has a table by size.
    """
    if task is TaskType.GRPO:
        return next(hours for most, hours in _GRPO_HOURS if billions <= most)
    flops = 2 * rows * 400 * 6 * billions * 1e9 * (1.4 if task is TaskType.DPO else 1.0)
    hours = flops / (market_gpus(task, billions) * 0.15 * 989e12) / _HOUR + 0.75
    return min(5.0, math.ceil(hours * 4) / 4)


def worth_of(task: TaskType, billions: float, hours: float) -> float:
    """Return what a finished task earns: the market's work value times the weight of its type."""
    return 2 * math.sqrt(hours * min(40.0, max(1.0, billions))) * _WEIGHTS[task]


def _offer(number: int, numbers: random.Random, market: Market) -> TraceOffer:
    task = _one_of(numbers, _TYPES)
    name, billions, architecture = _model(task, numbers, market)
    rows = _rows(task, architecture, numbers)
    hours = numbers.choice(_IMAGE_HOURS) if task is TaskType.IMAGE else time_limit(task, billions, rows)
    model: dict[str, Any] = {"name": name, "parameters": round(billions * 1e9), "source": _claim("models")}
    if architecture is not None:
        model["architecture"] = architecture.value
    spec = {
        "taskID": f"task-{number:05d}",
        "taskType": task.value,
        "model": model,
        "dataset": {**_DATASETS[task], "rows": rows, "source": _claim("data")},
        "timeLimitSeconds": round(hours * _HOUR),
        "priorityClassName": _one_of(numbers, _PRIORITIES),
        "output": _claim("outputs"),
    }
    shortest, longest = market.patience_bounds
    patience = numbers.lognormvariate(math.log(market.patience_median), market.patience_sigma)
    factor = numbers.lognormvariate(0.0, market.duration_sigma)
    fails, share = numbers.random() < market.failure_share, numbers.random()
    return TraceOffer(
        name=f"offer-{number:05d}",
        at=0.0,
        spec=TaskOfferSpec.model_validate(spec),
        patience=round(min(longest, max(shortest, patience)), 3),
        worth=worth_of(task, billions, hours),
        truth=Truth(factor=factor, fails_after=share if fails else None),
    )


def _model(task: TaskType, numbers: random.Random, market: Market) -> tuple[str, float, Architecture | None]:
    """Draw a model: its name, its billions of parameters, and what an image model is built like."""
    if task is TaskType.IMAGE:
        architecture = numbers.choice(list(_IMAGE_MODELS))
        return (*_IMAGE_MODELS[architecture], architecture)
    models = _BIG_MODELS if numbers.random() < market.big_share else _MODELS
    name, billions = numbers.choice(list(models.items()))
    if numbers.random() < market.anonymous_share:
        name = f"anonymous/model-{numbers.getrandbits(32):08x}"
    return name, billions, None


def _rows(task: TaskType, architecture: Architecture | None, numbers: random.Random) -> int:
    """Draw the rows that are trained on; those of pictures count each repeat, for a pass shows a picture once."""
    if architecture is not None:
        return min(numbers.randint(*_PICTURES) * _REPEATS, _MOST_PICTURES[architecture])
    least, most = _GRPO_ROWS if task is TaskType.GRPO else _TEXT_ROWS
    return round(math.exp(numbers.uniform(math.log(least), math.log(most))))


def _arrivals(count: int, numbers: random.Random, market: Market) -> list[float]:
    """Draw arrivals of a Poisson process whose rate switches between calm and busy after exponential spells."""
    found: list[float] = []
    now, busy = 0.0, False
    spell_ends = numbers.expovariate(1 / market.calm_spell)
    while len(found) < count:
        coming = now + numbers.expovariate(market.busy_rate if busy else market.calm_rate)
        if coming <= spell_ends:
            now = coming
            found.append(now)
        else:
            # An exponential waiting time has no memory, so the next one is simply drawn at the new rate.
            now, busy = spell_ends, not busy
            spell_ends += numbers.expovariate(1 / (market.busy_spell if busy else market.calm_spell))
    return found


def _one_of(numbers: random.Random, shares: dict[_T, float]) -> _T:
    return numbers.choices(list(shares), weights=list(shares.values()))[0]


def _claim(name: str) -> dict[str, Any]:
    return {"persistentVolumeClaim": {"claimName": name}}

"""Probes of whole runs: what is kept over a stop, and what an attempt does after one that failed; see ``probing``."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probing import Probe, clamps, history, listening, main, probe, train, trained

MOVING: dict[str, Any] = {
    "lora": {"loraDropout": 0.1},
    "train": {
        "maxSteps": 12,
        "evalSteps": 2,
        "saveSteps": 4,
        "saveTotalLimit": 8,
        "lrSchedulerType": "constant_with_warmup",
        "warmupSteps": 2,
        "stages": [{"share": 0.5, "factor": 1}, {"share": 0.5, "factor": 0.3}],
        "adaptiveLr": {"increase": 1.05, "decrease": 0.8, "patience": 1},
        "emaDecay": 0.9999,
        "emaUpdateEvery": 3,
    },
}


def checkpoint(course: Any, step: int) -> Path:
    return Path(course.config.checkpoint_dir) / f"checkpoint-{step}"


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@probe
def moving(found: Probe) -> Any:
    """A run with an average, stages and a following rate, and the same run stopped in its middle."""
    from safetensors.torch import load_file

    from taskoffer_trainer.averaging import decay_of

    whole = found.course(**MOVING)
    start = [value.clone() for value in whole.average._values]
    seen: list[list[Any]] = []

    def look(_args: Any, state: Any, _control: Any, **_: Any) -> None:
        seen.append([one.clone() for one in trained(whole).values()])

    with listening(whole, "on_step_end", look):
        train(whole)
    expected = start
    for updates, step in enumerate((3, 6, 9, 12)):
        decay = decay_of(0.9999, updates)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, seen[step - 1], strict=True)]
    apart = max(float((a - b).abs().max()) for a, b in zip(expected, whole.average._values, strict=True))
    place = found.folder / "resumed"
    (place / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint(whole, 8), place / "checkpoints" / "checkpoint-8")
    again = found.course(place=place, **MOVING)
    train(again, checkpoint(again, 8))
    files = [load_file(checkpoint(one, 12) / "averaged_model.safetensors") for one in (whole, again)]
    adapter = load_file(checkpoint(whole, 12) / "adapter_model.safetensors")
    rates = [history(one, "learning_rate") for one in (whole, again)]
    return {
        "rates": rates[0],
        "losses": history(whole, "eval_loss"),
        "factor": whole.trainer.learning_rate.factor,
        "ratesResumed": rates[1],
        "factorResumed": again.trainer.learning_rate.factor,
        "apartFromFormula": apart,
        "weightsEqual": equal(trained(whole), trained(again)),
        "averagesEqual": equal(*files),
        "updates": [whole.average.updates, again.average.updates],
        "namesEqual": files[0].keys() == adapter.keys(),
        "differs": not equal(files[0], adapter),
        "optimizerEqual": _optimizers_equal(whole, again),
    }


@probe
def signalled(found: Probe) -> Any:
    """A run that gets SIGTERM in its first evaluation, after the second of twelve steps."""
    course = found.course(**MOVING)
    measure = course.measure

    def measured(*given: Any) -> Any:
        course.stop._note(0, None)
        return measure(*given)

    course.measure = measured
    train(course)
    mark = checkpoint(course, 2) / "COMPLETE"
    return {
        "step": course.trainer.state.global_step,
        "cause": course.stop.cause.name,
        "losses": history(course, "eval_loss"),
        "mark": json.loads(mark.read_text()) if mark.exists() else None,
    }


@probe
def owed(found: Probe) -> Any:
    """Runs that get SIGTERM when an evaluation that takes long is due, and in the middle of one; and how they go on."""
    from unittest.mock import patch

    whole = train(found.course(**MOVING))

    def stopped(place: Path, arrange: Any) -> dict[str, Any]:
        (place / "checkpoints").mkdir(parents=True)
        first = found.course(place=place, **MOVING)
        with patch("taskoffer_trainer.callbacks.UNNOTICED_SECONDS", -1.0), arrange(first):
            train(first)
        left, begun = checkpoint(first, 4), history(first, "eval_loss")
        marks = [json.loads((left / "COMPLETE").read_text())["eval_loss"]]
        again = train(found.course(place=place, **MOVING), left)
        marks.append(json.loads((left / "COMPLETE").read_text())["eval_loss"])
        return {
            "step": first.trainer.state.global_step,
            "cause": first.stop.cause.name,
            "begun": begun,
            "marks": marks,
            "losses": history(again, "eval_loss"),
            "rates": history(again, "learning_rate"),
            "weightsEqual": equal(trained(whole), trained(again)),
            "optimizerEqual": _optimizers_equal(whole, again),
            "owedAfter": again.steps.owed,
        }

    @contextlib.contextmanager
    def when_due(course: Any) -> Iterator[None]:
        step = course.trainer.training_step

        def stepped(*given: Any, **more: Any) -> Any:
            if course.trainer.state.global_step == 3:
                course.stop._note(0, None)
            return step(*given, **more)

        course.trainer.training_step = stepped
        yield

    @contextlib.contextmanager
    def in_its_middle(course: Any) -> Iterator[None]:
        measure = course.measure

        def measured(model: Any, shared: bool, between: Any) -> Any:
            if course.trainer.state.global_step == 4:
                # One of the two rows is measured when it comes.
                course.evaluation.asked = 1
                calls = iter([lambda: None, lambda: course.stop._note(0, None)])
                return measure(model, shared, lambda: (next(calls, lambda: None)(), between()))
            return measure(model, shared, between)

        course.measure = measured
        with patch("taskoffer_trainer.trainer.UNNOTICED_SECONDS", -1.0):
            yield

    return {
        "losses": history(whole, "eval_loss"),
        "rates": history(whole, "learning_rate"),
        "due": stopped(found.folder / "due", when_due),
        "middle": stopped(found.folder / "middle", in_its_middle),
    }


@probe
def interrupted(found: Probe) -> Any:
    """Runs that get SIGTERM while the base model is measured, and while the average is."""
    from taskoffer_trainer.failures import StopRequestedError

    def measurements(fatal: int) -> list[Any]:
        course = found.whole(train={"maxSteps": 2, "evalSteps": 2, "saveSteps": 2, "emaDecay": 0.9})
        measured, calls, done = course.measure, [], []

        def measure(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == fatal:
                course.stop._note(0, None)
            figures = measured(*given)
            done.append(1)
            return figures

        course.measure = measure
        with contextlib.suppress(StopRequestedError):
            course.run()
        return [len(calls), len(done), course.stop.signalled]

    # The evaluation of the last step lies between them.
    return {"base": measurements(1), "average": measurements(3)}


@probe
def reserved(found: Probe) -> Any:
    """A run that is to be ready earlier than its time allows for."""
    return clamps(found.course(timeLimitSeconds=600, train={"reserveMinutes": 12}))


def _optimizers_equal(one: Any, other: Any) -> bool:
    states = [course.trainer.optimizer.state_dict()["state"] for course in (one, other)]
    import torch

    return all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))
        for key, entry in states[0].items()
        for name, value in entry.items()
    )


@probe
def choice(found: Probe) -> Any:
    """Runs whose trained weights are worse, and better, than their average."""
    result = {}
    for name, penalty in {"worse": 1.0, "better": -1.0}.items():
        course = found.whole(train={"maxSteps": 8, "emaDecay": 0.9999, "emaUpdateEvery": 2})
        with _judged(course, penalty):
            termination = course.run()
        folder = Path(course.config.output_dir) / "adapter"
        kept = Path(course.config.checkpoint_dir) / "checkpoint-8"
        exported = (folder / "adapter_model.safetensors").read_bytes()
        files = {"averaged": "averaged_model.safetensors", "trained": "adapter_model.safetensors"}
        manifest = json.loads((folder / "manifest.json").read_text())
        metrics = course.progress.metrics
        result[name] = {
            "candidates": manifest["candidates"],
            "after": termination.eval_loss_after,
            "exported": [which for which, file in files.items() if (kept / file).read_bytes() == exported],
            "metrics": [metrics["eval_loss_trained"], metrics["eval_loss_averaged"]],
            "inForce": manifest["inForce"],
        }
    return result


@contextlib.contextmanager
def _judged(course: Any, penalty: float) -> Iterator[None]:
    """Let the trained weights be measured as worse than they are, and what they are compared with as it is."""
    from taskoffer_trainer import course as courses

    measure, choose, choosing = course.measure, courses.chosen, [False]

    def judged(*arguments: Any) -> dict[str, float]:
        figures = measure(*arguments)
        return figures if choosing[0] else {**figures, "eval_loss": figures["eval_loss"] + penalty}

    def chosen(*arguments: Any) -> Any:
        choosing[0] = True
        found = choose(*arguments)
        # What is verified next is compared with what was measured, which for the trained weights was another figure.
        choosing[0] = found.weights.startswith("averaged")
        return found

    course.measure, courses.chosen = judged, chosen
    try:
        yield
    finally:
        courses.chosen = choose


@probe
def silence(found: Probe) -> Any:
    """Runs of a model that says nothing with its adapter, and something or nothing without."""
    from taskoffer_trainer import sft
    from taskoffer_trainer.failures import TrainerError

    answers, said = sft.answers, {}
    for name, before in {"silent before": "", "silenced": "Paris."}.items():
        given = iter([[before], [""], [""], [""]])
        sft.answers = lambda *_, given=given: next(given)  # type: ignore[assignment,misc]
        course = found.whole(train={"maxSteps": 2, "evalSteps": 2, "saveSteps": 2})
        try:
            said[name] = course.run().message
        except TrainerError as error:
            said[name] = f"{int(error.code)} {error.message}"
    sft.answers = answers
    return said


@probe
def standing(found: Probe) -> Any:
    """A run whose steps are too small for its evaluations to differ from the base model's."""
    train = {"maxSteps": 4, "evalSteps": 2, "saveSteps": 4, "learningRate": 1e-9, "adaptiveLr": {"patience": 3}}
    course = found.whole(train=train)
    course.run()
    return course.progress.metrics["learning_rate_factor"]


@probe
def fallback(found: Probe) -> Any:
    """An attempt with the last profile, from a checkpoint of one with none."""
    settings = {
        "lora": {"loraDropout": 0.1},
        "train": {**MOVING["train"], "lrSchedulerType": "constant", "warmupSteps": 0, "stages": []},
    }
    first = train(found.course(**settings))
    place = found.folder / "again"
    (place / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint(first, 8), place / "checkpoints" / "checkpoint-8")
    (place / "checkpoints" / "run.json").write_text(json.dumps({"profile": 3}))
    again = found.course(place=place, **settings)
    train(again, checkpoint(again, 8))
    layers = again.trainer.model.get_base_model().model.layers
    return {
        "clamps": [clamp for clamp in clamps(again) if clamp["reason"] == "FallbackProfile"],
        "rates": history(again, "learning_rate")[8:],
        "ratesBefore": history(first, "learning_rate")[8:],
        "dropout": type(layers[0].self_attn.q_proj.lora_dropout["default"]).__name__,
        "attention": again.progress.in_force["attnImplementation"],
        "profile": again.progress.in_force["fallbackProfile"],
        "rowsAtOnce": [again.steps.micro_batch.size, again.steps.applied.micro_batch_limit],
        "average": again.average is not None,
        "losses": history(again, "loss"),
        "step": again.trainer.state.global_step,
    }


def _count(graph: Any, _inputs: Any) -> Any:
    """A backend of torch.compile that runs the graph as it is, and counts how often."""

    def called(*arguments: Any) -> Any:
        COMPILED["calls"] += 1
        return graph.forward(*arguments)

    COMPILED["graphs"] += 1
    return called


def _fail(_graph: Any, _inputs: Any) -> Any:
    raise ValueError("this backend compiles nothing")


COMPILED = {"calls": 0, "graphs": 0}


@probe
def compiling(found: Probe) -> Any:
    import torch

    from taskoffer_trainer.failures import TrainerError

    for backend in (_count, _fail):
        torch._dynamo.register_backend(backend)  # type: ignore[attr-defined]
    settings = {"torchCompile": True, "maxSteps": 2, "evalSteps": 100, "saveSteps": 100, "maxLength": 48}
    plain = train(found.course(train=settings | {"torchCompile": False}))
    course = _compiled(found, _count, settings)
    course.trainer.compiling.LIMIT = 1
    calls: list[int] = []

    def change(*_: Any, **__: Any) -> None:
        calls.append(COMPILED["calls"])
        course.steps.micro_batch.asked = 2

    with listening(course, "on_step_end", change):
        train(course)
    try:
        train(_compiled(found, _fail, settings))
    except TrainerError as error:
        failure = [int(error.code), error.reason, error.message]
    else:
        failure = []
    return {
        "calls": calls,
        "losses": history(course, "loss"),
        "plain": history(plain, "loss"),
        "inForce": course.progress.in_force["torchCompile"],
        "clamps": [clamp for clamp in clamps(course) if clamp["field"] == "train.torchCompile"],
        "failure": failure,
    }


def _compiled(found: Probe, backend: Any, settings: dict[str, Any]) -> Any:
    """Prepare a training whose model is compiled by a backend of ours instead of one that takes a minute."""
    course = found.course(train=settings)
    plugin = course.trainer.accelerator.state.dynamo_plugin
    plugin.to_kwargs = lambda: {"backend": backend}
    return course


if __name__ == "__main__":
    main()

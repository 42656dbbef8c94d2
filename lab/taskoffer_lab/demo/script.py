"""What the demo shows: the models behind the examples, and the answer that each example must get."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taskoffer_lab.errors import LabError
from taskoffer_lab.fixtures.tiny_model import Family
from taskoffer_lab.install import project_root

NAMESPACE = "demo"
"""Where the offers live."""

MODELS_CLAIM, DATA_CLAIM, OUTPUTS_CLAIM = "models", "data", "outputs"
"""The claims that the examples name."""

LOSS_MARGIN = 0.15
"""The share by which each adapter must lower the held-out loss. The smallest fall seen with the examples is 27 %."""

EXAM_ROWS = 64
"""Rows that the demo keeps to itself: no trainer sees them, and the adapters are examined on them."""

WAITING = "WaitingForCapacity"


@dataclass(frozen=True)
class DemoModel:
    """A base model that the examples name.

    Attributes:
        folder: Its folder on the claim, which is also the last part of its name in the offers.
        family: Architecture.
        hidden_size: Width; with two layers it decides the number of parameters.
    """

    folder: str
    family: Family
    hidden_size: int


MODELS = (
    DemoModel("llama-0.6m", "llama", 128),
    DemoModel("qwen2-0.6m", "qwen2", 128),
    DemoModel("llama-1.7m", "llama", 256),
    DemoModel("mistral-1.7m", "mistral", 256),
    DemoModel("llama-3.4m", "llama", 384),
    DemoModel("phi3-3.4m", "phi3", 384),
)


@dataclass(frozen=True)
class Expected:
    """How an example must end: trained on a number of GPUs, or refused with a reason.

    Attributes:
        gpus: GPUs that it is trained on; None for one that is refused.
        refusal: The reason of the refusal.
    """

    gpus: int | None = None
    refusal: str | None = None


EXPECTED = {
    "small-llama": Expected(gpus=1),
    "small-qwen": Expected(gpus=1),
    "medium-llama": Expected(gpus=2),
    "medium-mistral": Expected(gpus=2),
    "large-llama": Expected(gpus=4),
    "large-phi": Expected(gpus=4),
    "too-long": Expected(refusal="TimeLimitTooLong"),
    "unknown-family": Expected(refusal="ModelFamilyNotAccepted"),
}
"""Offer name → how it must end."""


@dataclass(frozen=True)
class Script:
    """What one kind of run plays.

    Attributes:
        folder: Where its offers are, below the checkout.
        expected: Offer name → how it must end.
        at_once: Offers that may train at a time; None leaves that to the policy.
        train: Changes to the settings of all the policy's size classes.
    """

    folder: str
    expected: Mapping[str, Expected]
    at_once: int | None = None
    train: Mapping[str, int] = field(default_factory=dict)


EXAMPLES = Script("examples", EXPECTED)
"""Offers of text, some of which wait and some of which are refused."""

ALL_TYPES = Script(
    "examples/types",
    {
        name: Expected(gpus=1)
        for name in ("instruct", "chat", "preferences", "rewards", "pictures-sdxl", "pictures-flux")
    },
    # Two trainings keep two cores busy; six would only take from each other.
    at_once=2,
    train={"maxSteps": 20, "evalSteps": 10, "saveSteps": 10, "maxLength": 128},
)
"""One offer of each type of task, and of each architecture of images."""


@dataclass(frozen=True)
class Example:
    """One file of a script's folder, the offer in it, and how that must end."""

    path: Path
    manifest: dict[str, Any]
    expected: Expected

    @property
    def name(self) -> str:
        """The offer's name."""
        return str(self.manifest["metadata"]["name"])


def load_examples(folder: Path | None = None, script: Script = EXAMPLES) -> list[Example]:
    """Read a script's offers in the order of their file names.

    Args:
        folder: Where to read instead of the script's folder in the checkout.
        script: Says how each must end.

    Raises:
        LabError: A file holds something else than one TaskOffer, or the demo does not know how it must end.
    """
    folder = folder or project_root() / script.folder
    found = []
    for path in sorted(folder.glob("*.yaml")):
        documents = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item is not None]
        if len(documents) != 1 or documents[0].get("kind") != "TaskOffer":
            raise LabError(f"{path} does not hold just one TaskOffer")
        name = str(documents[0]["metadata"]["name"])
        if name not in script.expected:
            raise LabError(
                f"{path}: the demo does not know how offer {name!r} must end",
                f"name it in {Path(__file__).name}, or move the file elsewhere",
            )
        found.append(Example(path, documents[0], script.expected[name]))
    missing = script.expected.keys() - {example.name for example in found}
    if missing:
        raise LabError(f"{folder} lacks the offers {', '.join(sorted(missing))}", "restore the files of the checkout")
    return found

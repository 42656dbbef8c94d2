"""An exam for adapters that shares nothing with the trainer: other rows, other code, another process.

`python -m taskoffer_lab.demo.exam` reads one JSON document from stdin and writes one to stdout:
`{"rows": FILE, "pupils": [{"name", "model", "adapter", "task"}]}` → `{NAME: FIGURES}`. Every figure has `before` and
`after`; what they measure follows from the task: see the functions named in `EXAMS`.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taskoffer_lab.demo.exam_pictures import examine_pictures
from taskoffer_lab.demo.exam_text import examine, examine_preferences, examine_rewards

EXAMS: dict[str, Callable[[Path, Path, Sequence[dict[str, str]]], dict[str, Any]]] = {
    "InstructText": examine,
    "Chat": examine,
    "DPO": examine_preferences,
    "GRPO": examine_rewards,
    "Image": examine_pictures,
}
"""Type of the task → its exam, which gets the model's folder, the adapter's folder and the rows."""


def main() -> int:
    """Examine every adapter of the request and return the exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    request = json.load(sys.stdin)
    rows = [json.loads(line) for line in Path(request["rows"]).read_text(encoding="utf-8").splitlines()]
    answers = {}
    for pupil in request["pupils"]:
        print(f"examining {pupil['name']}", file=sys.stderr, flush=True)
        exam = EXAMS[pupil.get("task", "InstructText")]
        answers[pupil["name"]] = exam(Path(pupil["model"]), Path(pupil["adapter"]), rows)
    json.dump(answers, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

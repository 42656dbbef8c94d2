"""A completion depends on its prompt, its seed and the model, and on nothing that it is drawn together with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig

from .conftest import merge
from .preloaded import Preloader

pytestmark = pytest.mark.trainer

SCRIPT = """
import sys
from pathlib import Path
import torch
from collections import Counter
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from taskoffer_trainer import drawing
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.drawing import Completion, Drawer, KeptTokens, _Inversion, random_numbers, token_log_probs
from trl.trainer.utils import add_fused_lm_head

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.train()
tokens = KeptTokens.of(model, tokenizer, 10, 1.3)
asked = [Completion(tokenizer(text)["input_ids"], seed)
         for seed, text in enumerate(["one", "a rather longer prompt than the others", "two words", "one"])]

def ids(completions):
    return [list(one.ids) for one in completions]

together = Drawer(tokens)(model, asked, 4)
assert ids(together) == ids(Drawer(tokens)(model, asked, 1)) == ids(Drawer(tokens)(model, asked, 3)), "batch"
assert ids(together)[2:] == ids(Drawer(tokens)(model, asked[2:], 4)), "neighbours"
assert ids(together)[0] != ids(together)[3], "seeds"
assert model.training
assert all(len(one.ids) <= 10 for one in together)
assert [one.prompt_ids for one in together] == [one.prompt_ids for one in asked]

# What the model's own file recommends does not change what it says.
before = model.generation_config
model.generation_config = type(before)(**{**before.to_dict(), "repetition_penalty": 50.0, "do_sample": True,
                                          "temperature": 0.01, "top_k": 1, "top_p": 0.01, "no_repeat_ngram_size": 1,
                                          "bad_words_ids": None, "min_new_tokens": 9, "suppress_tokens": [5]})
assert ids(Drawer(tokens)(model, asked, 4)) == ids(together), "recommended"
model.generation_config = before

# An end token ends a completion, and is kept.
cut = KeptTokens(tokens.pad, [together[0].ids[2], *tokens.ends], 10, 1.3)
assert ids(Drawer(cut)(model, asked[:1], 1))[0] == list(together[0].ids[: together[0].ids.index(cut.ends[0]) + 1])

# Memory for two rows at once: the same completions, and four are not tried again.
class Little(Drawer):
    sizes = []
    def _draw(self, model, asked):
        self.sizes.append(len(asked))
        if len(asked) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return super()._draw(model, asked)
little = Little(tokens)
assert ids(little(model, asked, 4)) == ids(together) == ids(little(model, asked, 4))
assert little.sizes == [4, 2, 2, 2, 2], little.sizes

# A later attempt does not try what did not fit either, and one completion that does not fit ends the run.
folder = Path(sys.argv[2])
first, later = Little(tokens, folder=folder), Little(tokens, folder=folder)
assert (first.fits, later.fits) == (None, None)
assert ids(first(model, asked, 3)) == ids(together)
Little.sizes.clear()
assert Little(tokens, folder=folder).fits == 1
assert ids(Little(tokens, folder=folder)(model, asked, 4)) == ids(together)
assert Little.sizes == [1] * 4, Little.sizes
class Never(Drawer):
    def _draw(self, model, asked):
        raise torch.AcceleratorError("CUDA error: out of memory")
def refusal(drawer):
    try:
        drawer(model, asked, 4)
    except TrainerError as error:
        return error.code, error.reason, error.message
assert refusal(Never(tokens))[:2] == (138, "OutOfMemory")
# Of a model that is shared out the other ranks wait, so the attempt ends, and the next one draws fewer.
drawing.is_shared_out = lambda _: True
shared = Path(sys.argv[3])
code, reason, said = refusal(Little(tokens, folder=shared))
assert (code, reason) == (138, "TooManyRowsAtOnce") and said.endswith("the next attempt draws 2"), said
assert Little(tokens, folder=shared).fits == 2
assert ids(Little(tokens, folder=shared)(model, asked, 4)) == ids(together)
drawing.is_shared_out = lambda _: False

# The draws follow the probabilities at the temperature: frequencies of 20,000 draws of one token of four.
logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
wanted = torch.softmax(logits[0] / 1.3, -1)
numbers = random_numbers(range(20000), 1)
choice = _Inversion(numbers, 3, 1.3)(torch.zeros(20000, 3, dtype=torch.long), logits.expand(20000, 4)).argmax(-1)
found = torch.bincount(choice, minlength=4) / 20000
# Five standard deviations of a frequency are below 0.018.
assert (found - wanted).abs().max() < 0.018 and found[2] == 0, (found, wanted)
# The largest number below 1 points to a token that can be drawn, also where the sum is rounded.
edge = _Inversion(torch.tensor([[1.0 - 2**-24]]), 3, 1.0)(torch.zeros(1, 3, dtype=torch.long), logits)
assert edge.argmax() == 3
assert random_numbers([], 4).shape == (0, 4)

# Log-probabilities are those of the plain model.
add_fused_lm_head(model, temperature=1.3)
model.eval()
with torch.no_grad():
    logs, mask = token_log_probs(model, together, tokens.pad)
    for row, one in enumerate(together):
        whole = torch.tensor([[*one.prompt_ids, *one.ids]])
        plain = torch.log_softmax(model(input_ids=whole).logits[0].float() / 1.3, -1)
        for place, token in enumerate(one.ids):
            assert abs(plain[len(one.prompt_ids) + place - 1, token] - logs[row, place]) < 1e-4
        assert mask[row].sum() == len(one.ids)
print("drawn")
"""


def test_draws_are_a_pure_function_of_seed_prompt_and_model(
    fixtures_dir: Path, libraries: Preloader, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    arguments = [str(fixtures_dir / "llama"), str(tmp_path), str(tmp_path / "shared")]
    done = libraries.run(["-c", SCRIPT, *arguments], dict(os.environ))
    assert done.stdout.endswith("drawn\n"), done.stdout[-3000:]


def test_how_many_are_drawn_at_once_is_what_the_first_attempt_settled(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    from taskoffer_trainer.drawing import settled_at_once
    from taskoffer_trainer.world import World

    def settled(rows: int, most: int | None = None, folder: str = "", **more: Any) -> int:
        train = {"perDeviceTrainBatchSize": rows, "gradientAccumulationSteps": 8 // rows, **more}
        (tmp_path / folder).mkdir(exist_ok=True)
        place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / folder)}
        return settled_at_once(RunConfig.model_validate(merge(base_config, {**place, "train": train})), World(), most)

    assert settled(4) == 16
    # Another attempt with fewer rows at once goes on drawing as many, unless it is to take as few as possible.
    assert (settled(2), settled(2, most=8), settled(8)) == (16, 8, 16)
    # A limit of tokens is one on rows of full length, with which memory is planned.
    assert settled(8, folder="tokens", perDeviceTrainMaxTokens=3 * 160) == 4 * 3
    assert settled(8, folder="few", perDeviceTrainMaxTokens=8) == 4


PIECES = """
import torch
from taskoffer_trainer.drawing import Completion, left_padded, right_padded
from taskoffer_trainer.grpo import ReinforcementTrainer
from taskoffer_trainer.tuning import MicroBatch

rows = [Completion([1] * (40 - 9 * place), 0, [2] * (3 + 8 * place)) for place in range(4) for _ in range(4)]
lengths = ReinforcementTrainer.lengths_of(None, rows)
pieces = MicroBatch(16, most=16, most_tokens=200).cuts(len(rows), lengths=lengths)
tokens = []
for piece in pieces:
    cut = rows[piece.start:piece.stop]
    prompts, _ = left_padded([one.prompt_ids for one in cut], 0, "cpu")
    ids, _ = right_padded([one.ids for one in cut], 0, "cpu")
    tokens.append(torch.cat([prompts, ids], dim=1).numel())
assert sum(map(len, pieces)) == 16 and len(pieces) < 16, pieces
assert max(tokens) <= 200, tokens
print("kept")
"""


def test_a_limit_of_tokens_is_kept_for_completions_with_their_prompts(libraries: Preloader) -> None:
    """Prompts are padded on the left and completions on the right, so that a piece is as wide as both longest ones."""
    done = libraries.run(["-c", PIECES], dict(os.environ))
    assert done.stdout.endswith("kept\n"), done.stdout[-3000:]

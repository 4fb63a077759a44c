"""The texts of a step: their tokens and targets, what the model expects after them, and what each place sees."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset

from emoft.data.batching import IGNORED
from emoft.data.spelling import spell
from emoft.data.steps import Step
from emoft.gradients.leaks import TOLERANCE as UNMOVED
from emoft.gradients.leaks import hidden_states
from emoft.gradients.listener import attention_scores
from emoft.model.loading import TextModel
from emoft.step.look import Look
from emoft.step.numbers import Prediction, Text

LIKELIEST = 5
SEEN_TEXTS = 2  # of which it is measured what each place sees: a forward pass for each of their tokens


@dataclass
class Shown:
    """What is told of the texts of a step."""

    texts: list[Text]  # the first ones
    mean_of_means: float  # of the mean losses of all texts
    predictions: list[Prediction]
    largest_difference: float  # of a loss to that of `F.cross_entropy`
    attention: list[list[list[float]]]  # see `Numbers`
    aligned_share: float  # of all targets, those that are the next token
    seen_wrongly: int  # places that see what they must not, or do not see what they must


@dataclass(frozen=True)
class TextReader:
    """Reads the texts of a step."""

    text_model: TextModel
    rows: Dataset  # of the train split
    batching: str  # "packed" or "padded"
    dtype: torch.dtype  # of the step's matrix products

    @torch.no_grad()
    def read(self, step: Step, look: Look, count: int) -> Shown:
        """Return what is told of the first texts of a step, while the weights are still as the step found them."""
        texts = self._texts(step, look)
        means = [sum(found) / len(found) for text in texts if (found := [x for x in text.losses if x is not None])]
        shown = texts[:count]
        predictions, difference = self._predictions(shown, look)
        return Shown(
            shown,
            sum(means) / max(1, len(means)),
            predictions,
            difference,
            self._attention(shown, look),
            replace(step, targets=look.given).aligned_share(),
            self._sight(shown),
        )

    def _texts(self, step: Step, look: Look) -> list[Text]:
        """Return the texts of the step, with what the loss was given of each."""
        tokenizer = self.text_model.tokenizer
        found: list[Text] = []
        for batch, (targets, places, losses) in zip(step.micro_batches, look.given, strict=True):
            owners, ids = batch.owners().flatten(), batch.inputs["input_ids"].flatten()
            positions = batch.inputs.get("position_ids")
            width = batch.inputs["input_ids"].shape[1]
            positions = torch.arange(len(ids)) % width if positions is None else positions.flatten()
            target_of = dict(zip(places.tolist(), zip(targets.tolist(), losses.tolist(), strict=True), strict=True))
            for number in range(batch.examples):
                row = step.examples[len(found)]
                where = (owners == number).nonzero().flatten().tolist()
                given = [target_of.get(place, (IGNORED, 0.0)) for place in where]
                of_text = ids[where].tolist()
                found.append(
                    Text(
                        row=row,
                        text=self._filled(row),
                        ids=of_text,
                        tokens=spell(tokenizer, of_text),
                        positions=positions[where].tolist(),
                        targets=[None if target == IGNORED else target for target, _ in given],
                        losses=[None if target == IGNORED else loss for target, loss in given],
                        target_tokens=[
                            None if target == IGNORED else spell(tokenizer, [target])[0] for target, _ in given
                        ],
                    )
                )
        return found

    def _filled(self, row: int) -> str:
        example = self.rows[row]
        return self.text_model.text_format.fill(example["text"], example.get("label", ""))

    def _predictions(self, shown: list[Text], look: Look) -> tuple[list[Prediction], float]:
        """Return what the model expects at the hardest and the easiest place of the texts shown.

        And how far the loop's losses are from those of `F.cross_entropy`, at most; all in the precision of the step.
        """
        head, tokenizer = self.text_model.model.lm_head.weight, self.text_model.tokenizer
        found: list[Prediction] = []
        difference, number = 0.0, 0
        for batch, hidden, (targets, places, losses) in zip(look.batches, look.hidden, look.given, strict=True):
            dtype = self.dtype
            rows = hidden.flatten(0, 1)[places]
            logits = (rows.to(dtype) @ head.to(dtype).T).float()  # (K, V)
            by_formula = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
            difference = max(difference, float((by_formula - losses).abs().max()))
            owners = batch.owners().flatten().to(places.device)[places]
            for text in range(batch.examples):
                if number == len(shown):
                    break
                mine = ((owners == text) & (targets != IGNORED)).nonzero().flatten()
                start = int((batch.owners().flatten() == text).nonzero()[0])
                if len(mine):
                    by_loss = losses[mine].argsort()
                    for k in dict.fromkeys([int(mine[by_loss[-1]]), int(mine[by_loss[0]])]):
                        chances = logits[k].softmax(-1)
                        top = chances.topk(min(LIKELIEST, len(chances)))
                        found.append(
                            Prediction(
                                number,
                                int(places[k]) - start,
                                spell(tokenizer, top.indices.tolist()),
                                top.values.tolist(),
                                spell(tokenizer, [int(targets[k])])[0],
                                float(chances[targets[k]]),
                                float(losses[k]),
                            )
                        )
                number += 1
        return found, difference

    def _attention(self, shown: list[Text], look: Look) -> list[list[list[float]]]:
        """Return where each place of the shown texts of the first micro-batch looks in the first block."""
        if look.scores is None:
            return []
        block: Any = self.text_model.model.transformer.h[0]
        values, batch = look.scores.float().flatten(0, -2), look.batches[0]
        owners = batch.owners().flatten()
        rows = [values[(owners == text).nonzero().flatten()] for text in range(min(len(shown), batch.examples))]
        return [attention_scores(block.attn, each).softmax(-1).mean(0).tolist() for each in rows]

    @torch.no_grad()
    def _sight(self, shown: list[Text]) -> int:
        """Change each token of the first texts shown, and count which places it moves; then how many do not fit."""
        model, texts = self.text_model.model, [text.ids for text in shown[:SEEN_TEXTS]]
        for text in shown[:SEEN_TEXTS]:
            text.sees = [0] * len(text.ids)
        model.eval()
        before, wrong = hidden_states(model, texts, self.batching), 0
        scale = max(float(states.abs().max()) for states in before)
        for number, place in ((number, place) for number, ids in enumerate(texts) for place in range(len(ids))):
            changed = [list(ids) for ids in texts]
            changed[number][place] = (changed[number][place] + 1 + place) % model.config.vocab_size
            after = hidden_states(model, changed, self.batching)
            for other, text in enumerate(shown[:SEEN_TEXTS]):
                moves = ((after[other] - before[other]).abs().amax(-1) / scale).tolist()  # (T,)
                must_see = [other == number and t >= place for t in range(len(moves))]
                sees = [move > (0.0 if must else UNMOVED) for move, must in zip(moves, must_see, strict=True)]
                wrong += sum(one != must for one, must in zip(sees, must_see, strict=True))
                text.sees = [count + one for count, one in zip(text.sees, sees, strict=True)]
        model.train()
        return wrong

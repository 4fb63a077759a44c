"""What --quantize int8 costs: the perplexity of a model's validation texts in float32 and in eight bits.

`python tests/quantized.py MODEL FILE.txt` reads a folder that train.py saved and lines of text;label (or of text), and
prints both, and how often the likeliest token is another one.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it finds the package beside its folder

from emoft.data.template import TextFormat  # noqa: E402
from emoft.data.tokens import encode  # noqa: E402
from emoft.model.decoding import Decoder  # noqa: E402
from emoft.model.loading import load_model  # noqa: E402
from emoft.model.tokenizer import load_tokenizer  # noqa: E402
from emoft.training.precision import Precision  # noqa: E402

BATCH = 64


@torch.no_grad()
def score(decoder: Decoder, texts: list[list[int]]) -> tuple[float, torch.Tensor]:
    """Return the summed cross-entropy of all tokens but the first of each text, in nats, and the likeliest tokens."""
    total, likeliest = 0.0, []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        rows, scores = decoder.begin([text[:1] for text in part], 0)
        for place in range(1, len(part[0])):
            goes_on = torch.tensor([len(text) > place for text in part])
            targets = torch.tensor([text[place] if len(text) > place else 0 for text in part])
            total += float(cross_entropy(scores[goes_on], targets[goes_on], reduction="sum"))
            likeliest.append(scores[goes_on].argmax(-1))
            scores = decoder.read(targets[:, None], rows)
    return total, torch.cat(likeliest)


def main(folder: str, file: str) -> None:
    model, tokenizer, text_format = load_model(folder).eval(), load_tokenizer(folder), TextFormat.load(Path(folder))
    lines = [line.rsplit(";", 1) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    filled = [text_format.fill(*line) for line in lines]
    texts = sorted(encode(tokenizer, filled, text_format), key=len, reverse=True)
    targets = sum(len(text) - 1 for text in texts)
    results = [score(Decoder(model, Precision("no", torch.device("cpu")), int8), texts) for int8 in (False, True)]
    for name, (total, _) in zip(("float32", "int8"), results, strict=True):
        print(f"{name}: perplexity {torch.tensor(total / targets).exp():.3f} of {targets:,} tokens")
    other = (results[0][1] != results[1][1]).float().mean()
    print(f"the likeliest token is another one at {other:.2%} of all places")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The model card: README.md of an output folder, in the form that the Hugging Face Hub reads."""

import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from emoft.config import TrainConfig
from emoft.data.template import TextFormat
from emoft.files import CARD_FILE, write_text

MARK = "<!-- written by emoft: edited, it is yours, if you remove this line -->"
DATA_LICENSES = {"dair-ai/emotion": "for research and education only (Saravia et al., EMNLP 2018)"}
MODEL_LICENSES = dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "mit") | {"distilgpt2": "apache-2.0"}
# Of the results, what the Hub knows by a type, and what it is called in the table.
METRICS = {
    "loss": "loss, in nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "emotion_accuracy": "emotion accuracy",
    "macro_f1": "macro F1 of emotions",
}
TYPES = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte", "emotion_accuracy": "accuracy",
         "macro_f1": "f1"}  # fmt: skip


def write_card(
    folder: Path, config: TrainConfig, text_format: TextFormat, results: dict[str, Any], device: str
) -> None:
    """Write the card into a folder, unless somebody's own README.md is there.

    Args:
        folder: of the model.
        config: of the run.
        text_format: of the model.
        results: of `Tracker.results`, with those of evaluations.
        device: that it was trained on, in words.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CARD_FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(path, str(build_card(config, text_format, results, device)))


def build_card(config: TrainConfig, text_format: TextFormat, results: dict[str, Any], device: str) -> ModelCard:
    """Return the card of a trained model; see `write_card`."""
    name = Path(config.output_dir).resolve().name
    data, data_name = _data(config), Path(config.train_file).name or config.dataset_name
    figures = _figures(results)
    base = (
        config.model_name_or_path if config.model_name_or_path and not Path(config.model_name_or_path).exists() else ""
    )
    metadata = ModelCardData(
        model_name=name,
        base_model=base or None,
        license=MODEL_LICENSES.get(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "emotion", "emoft"],
        datasets=None if config.train_file else [config.dataset_name],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data_name,
                dataset_name=f"{data_name}, {split} split",
                dataset_split=split,
                metric_type=TYPES[metric],
                metric_name=METRICS[metric],
                metric_value=value,
                metric_args={"interval_95": interval} if interval else None,
            )
            for split, metric, value, interval in figures
        ]
        or None,
    )
    origin = f"[{base}](https://huggingface.co/{base}), fine-tuned" if base else "random weights"
    if config.model_name_or_path and not base:
        origin = f"a model in a folder, {Path(config.model_name_or_path).name}"
    parts = [
        f"# {name}",
        f"A GPT-2 that writes short emotional texts, made from {origin} by emoft: a training loop written out by hand"
        " in plain PyTorch.",
        "## How to prompt it",
        _prompting(text_format, name),
        "## Data",
        data,
        "## Figures",
        _table(figures) or "It was not evaluated: the run had no validation split.",
        _overlap(results),
        "## Training",
        _training(config, results, device),
        "## Limits",
        "It was trained on short texts in which people tell how they feel, and knows emotions by the words of such"
        " texts. What it writes is not true, may offend, and says nothing about any person. It is no judge of how"
        " somebody feels: do not use it to decide about people.",
        MARK,
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _prompting(text_format: TextFormat, name: str) -> str:
    label = text_format.labels[0] if text_format.label_first and text_format.labels else ""
    lines = [f"Texts had the form `{text_format.template}`, of at most {text_format.max_length} tokens"]
    lines[0] += ", each ended by end-of-text." if text_format.append_eos else ", without end-of-text."
    if text_format.labels:
        lines.append(f"Its emotions: {', '.join(text_format.labels)}.")
    prompt = text_format.prompt(label) if label else text_format.prompt()
    lines.append(
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{name}")\n'
        f"print(generator({prompt!r}, max_new_tokens=40, do_sample=True, top_k=50)[0]['generated_text'])\n```"
    )
    return "\n\n".join(lines)


def _data(config: TrainConfig) -> str:
    if config.train_file:  # the name alone: a path is of somebody's machine
        return f"A file of the user's, `{Path(config.train_file).name}`; its licence is not known to emoft."
    licence = DATA_LICENSES.get(config.dataset_name, "whose licence is not known to emoft")
    return f"[{config.dataset_name}](https://huggingface.co/datasets/{config.dataset_name}), {licence}."


def _figures(results: dict[str, Any]) -> list[tuple[str, str, float, list[float]]]:
    """Return split, metric, value and interval of what was measured of this model."""
    found = []
    for split, prefix in (("validation", "eval_"), ("test", "test_")):
        for metric in METRICS:
            # The Trainer's names: loss has a prefix, what emoft adds for the validation split may have none.
            key = next((k for k in (f"{prefix}{metric}", metric if split == "validation" else "") if k in results), "")
            if key and isinstance(results[key], int | float):
                found.append((split, metric, float(results[key]), list(results.get(f"{key}_interval", []))))
    return found


def _table(figures: list[tuple[str, str, float, list[float]]]) -> str:
    if not figures:
        return ""
    lines = ["| figure | split | value | 95 % interval |", "| --- | --- | ---: | ---: |"]
    for split, metric, value, interval in figures:
        told = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        lines.append(f"| {METRICS[metric]} | {split} | {value:.4f} | {told} |")
    return "\n".join(lines)


def _overlap(results: dict[str, Any]) -> str:
    found = next((results[key] for key in ("eval_overlap", "overlap") if key in results), None)
    if found is None:
        return ""
    return f"{found:,} of the validation texts stand in the train split too, exactly or nearly."


def _training(config: TrainConfig, results: dict[str, Any], device: str) -> str:
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in _changed(config).items()]
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "datasets"))
    return "\n".join(
        [
            f"```bash\npython train.py {' '.join(flags)}\n```\n",
            f"- seed {config.seed}; {results.get('train_runtime', 0.0):,.0f} seconds of training on {device}",
            f"- Python {platform.python_version()}, {packages}",
        ]
    )


def _changed(config: TrainConfig) -> dict[str, Any]:
    """Return the flags that are not at their defaults, but for folders and files, of which the name alone is told."""
    values = {}
    for name, flag in config.__dataclass_fields__.items():
        value = getattr(config, name)
        default = flag.default_factory() if callable(flag.default_factory) else flag.default
        if value == default or name in ("resume_from_checkpoint", "overwrite_output_dir", "push_to_hub"):
            continue
        is_path = isinstance(value, str) and Path(value).exists()
        values[name] = Path(value).name if is_path else " ".join(map(str, value)) if isinstance(value, list) else value
    return values

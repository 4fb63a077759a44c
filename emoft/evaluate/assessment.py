"""All that is told of a saved model: its figures on a split, and the quality of the texts that it writes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from emoft.config import EvaluateConfig
from emoft.data import hub
from emoft.data.duplicates import mark_duplicates
from emoft.data.reading import read_evaluation_splits
from emoft.data.template import TextFormat
from emoft.data.tokenized import describe_cut, tokenize
from emoft.device import choose_device
from emoft.distributed.world import World
from emoft.errors import UserError, warn
from emoft.evaluate.classification import Classification, classify, label_scores, log_prior
from emoft.evaluate.confusion import confusion_map
from emoft.evaluate.quality import IndependentClassifier, TrainingTexts, assess, format_quality, people, sample
from emoft.evaluate.scoring import evaluate, format_figures
from emoft.evaluate.suspects import Suspicion, cross_fitted, find_suspects, write_suspects
from emoft.files import (
    CONFUSION_FILE,
    EVALUATION_FILE,
    FORMAT_FILE,
    SAMPLES_FILE,
    SUSPECTS_FILE,
    finite,
    make_folder,
    write_json,
)
from emoft.hints import python
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import keep_freed_memory, use_fast_kernels
from emoft.model.loading import TextModel, check_fit, load_model
from emoft.model.steering import build_steering
from emoft.model.tokenizer import load_tokenizer
from emoft.terminal import Bar
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime


def read_format(config: EvaluateConfig) -> TextFormat:
    """Return the format that the model was trained with, with what the flags change of it.

    Raises:
        UserError: there is none, and no flag gives one.
    """
    name = config.model_name_or_path
    if name == EvaluateConfig.model_name_or_path and not Path(name).is_dir():
        raise UserError(
            f"no folder {name} here: train first with {python()} train.py, or name a model by --model_name_or_path"
        )
    folder = hub.model_folder(name, "model_name_or_path", config.model_revision)
    if (folder / FORMAT_FILE).exists():
        text_format = TextFormat.load(folder)
    elif config.template:
        text_format = TextFormat(config.template)
    else:
        raise UserError(
            f"--model_name_or_path {name} has no {FORMAT_FILE}, which holds its template: give --template, such as"
            " '{text}' or '{label}: {text}'"
        )
    if config.template and config.template != text_format.template:
        text_format = replace(text_format, template=config.template, labels=[])
    if config.max_length:
        text_format = replace(text_format, max_length=config.max_length)
    if config.append_eos is not None:
        text_format = replace(text_format, append_eos=config.append_eos)
    return text_format


def load_text_model(name: str, revision: str, text_format: TextFormat, device: torch.device) -> TextModel:
    """Return a saved model, ready to be evaluated.

    Raises:
        UserError: it cannot be had, or has fewer positions than a text may be long.
    """
    tokenizer = load_tokenizer(name, revision=revision)
    model = load_model(name, revision)
    check_fit(model, tokenizer)
    if text_format.max_length > model.config.n_positions:
        raise UserError(
            f"--max_length {text_format.max_length} is above the model's {model.config.n_positions} positions: lower it"
        )
    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    use_packed_attention(model)
    use_fast_kernels(model)
    model.eval()
    return TextModel(model, tokenizer, text_format)


def assess_model(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a saved model, print and keep the figures, and return them.

    Raises:
        UserError: something the user can mend.
    """
    device = choose_device(config.use_cpu)
    keep_freed_memory(device)
    torch.manual_seed(config.seed)
    text_format = read_format(config)
    if config.generate and not text_format.has_label:
        raise UserError(
            f"--generate {config.generate} needs a template with {{label}}, and the model's is"
            f" {text_format.template!r}: train with one, as train.py --config conditional does"
        )
    if config.generate and not text_format.label_first:
        raise UserError(
            f"--generate {config.generate} needs a template with {{label}} before {{text}}, which can steer what is"
            f" generated, and the model's is {text_format.template!r}: train with one"
        )
    splits, text_format = read_evaluation_splits(config, text_format)
    if config.use_class_prior and not (text_format.has_label and "train" in splits):
        raise UserError(
            "--use_class_prior counts the labels of a train split: give --train_file, and a {label} template"
        )
    if "train" in splits:
        splits, found = mark_duplicates(splits)
        if found and not config.json:
            print(found)

    # One process: torchrun is for training.
    runtime = Runtime(World(), Precision(config.mixed_precision, device))
    text_model = load_text_model(config.model_name_or_path, config.model_revision, text_format, device)
    tokenizer = text_model.tokenizer

    rows = tokenize(splits["test"], tokenizer, text_format, "test")
    if (cut := describe_cut(rows, text_format, "test")) and not config.json:
        print(cut)
    batch_size = config.per_device_eval_batch_size
    evaluation = evaluate(text_model, rows, runtime, batch_size)
    assert evaluation
    results = evaluation.figures()
    results |= {"examples": evaluation.examples, "tokens": evaluation.tokens, "bytes": evaluation.text_bytes}
    classification = None
    if text_format.has_label:
        prior = log_prior(splits["train"]["label"], text_format) if config.use_class_prior else None
        classification = classify(text_model, rows, runtime, batch_size, prior)
        if classification:
            results |= classification.figures()
            results["confusion_matrix"] = {
                "labels": classification.labels,
                "counts": classification.confusion.tolist(),  # true labels down, predicted ones across
            }
    suspicion = judge_labels(config, text_model, splits, runtime) if config.suspects else None
    if suspicion:
        results |= suspicion.figures() | {"suspects": [asdict(each) for each in suspicion.suspects]}
    if config.generate:
        results |= write_and_assess(config, text_model, splits, runtime)
    report(config, results, classification, suspicion)
    return results


def judge_labels(
    config: EvaluateConfig, text_model: TextModel, splits: dict[str, Dataset], runtime: Runtime
) -> Suspicion:
    """Return the rows whose labels are doubted by what has not seen them, and write all rows of the split.

    Those of the train split are judged by other models, fitted on other parts of it; without one those of the texts
    that are evaluated on, by the model itself.

    Raises:
        UserError: there are no labels to judge, or the package that judges is missing.
    """
    text_format = text_model.text_format
    if not text_format.has_label or len(text_format.labels) < 2:
        raise UserError(f"--suspects judges labels, and the template {text_format.template!r} has none, or only one")
    if not IndependentClassifier.is_available():
        raise UserError("--suspects needs the package scikit-learn: run pip install scikit-learn")
    name = "train" if "train" in splits else "test"
    texts, labels = list(splits[name]["text"]), list(splits[name]["label"])
    names = sorted({*labels, *text_format.labels})
    if name == "train":
        try:
            with Bar("Judging labels"):
                chances = cross_fitted(texts, labels, names, config.seed)
        except ValueError as error:
            raise UserError(
                f"--suspects: the labels of the train split cannot be judged ({str(error).splitlines()[0]}): give more"
                " texts of each"
            ) from None
        judged_by = "logistic regressions over TF-IDF, each fitted on other rows of the train split"
    else:
        scores = label_scores(text_model, texts, runtime, config.per_device_eval_batch_size)
        assert scores is not None
        chances = np.zeros((len(texts), len(names)))
        chances[:, [names.index(label) for label in text_format.labels]] = torch.tensor(scores).softmax(1).numpy()
        judged_by = "the model itself, which must not have been trained on these texts"
    found = find_suspects(texts, labels, names, chances, config.suspects, judged_by)
    if config.output_dir:
        write_suspects(make_folder(Path(config.output_dir)) / SUSPECTS_FILE, found, texts, labels)
    return found


def write_and_assess(
    config: EvaluateConfig, text_model: TextModel, splits: dict[str, Dataset], runtime: Runtime
) -> dict[str, Any]:
    """Return the figures of sampled texts, "generation", and how the classifier that judges them does itself."""
    text_format, batch_size = text_model.text_format, config.per_device_eval_batch_size
    train, results = splits.get("train"), {}
    training = independent = None
    if train is None:
        warn("no train split: nothing can be said of copies, nor by an independent classifier; give --train_file")
    else:
        training = TrainingTexts(train["text"])
        independent = fit_independent(train, text_format)
        test = splits["test"].filter(
            lambda label: label in text_format.labels, input_columns="label", keep_in_memory=True
        )
        if independent and len(test):
            found = independent.classify(test["text"], test["label"], text_format.labels).figures()
            results = {f"tfidf_{name}": value for name, value in found.items() if name != "classified"}
    options = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "steering": build_steering(text_model.tokenizer, text_format, config.strength) if config.strength else None,
    }
    samples = sample(text_model, config.generate, config.mixed_precision, batch_size, config.seed, **options)
    if config.output_dir:
        folder = make_folder(Path(config.output_dir))
        lines = [
            json.dumps({"emotion": label, "text": result.text, "finished": result.finished}, ensure_ascii=False)
            for label, generated in samples.items()
            for result in generated
        ]
        (folder / SAMPLES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    results["generation"] = assess(text_model, samples, runtime, batch_size, training, independent)
    human = people(text_model, list(splits["test"]["text"]), list(splits["test"]["label"]), config.generate)
    if human:
        results["people"] = assess(text_model, human, runtime, batch_size, training, independent)["all"]
    return results


def fit_independent(train: Dataset, text_format: TextFormat) -> IndependentClassifier | None:
    """Return the independent classifier, fitted on the texts whose label the model knows; None if it cannot be."""
    if not IndependentClassifier.is_available():
        warn("no independent classifier without the package scikit-learn: run pip install scikit-learn")
        return None
    known = train.filter(lambda label: label in text_format.labels, input_columns="label", keep_in_memory=True)
    try:
        return IndependentClassifier(known["text"], known["label"])
    except ValueError as error:
        warn(f"no independent classifier, which cannot be fitted on the train split ({str(error).splitlines()[0]})")
        return None


def report(
    config: EvaluateConfig,
    results: dict[str, Any],
    classification: Classification | None,
    suspicion: Suspicion | None = None,
) -> None:
    """Print the figures, and write them into the output folder if there is one."""
    if config.output_dir:
        folder = make_folder(Path(config.output_dir))
        write_json(folder / EVALUATION_FILE, results)
        if classification:
            picture = confusion_map(classification.labels, classification.confusion)
            Image.fromarray(picture).save(folder / CONFUSION_FILE)
    if config.json:
        print(json.dumps(finite(results), ensure_ascii=False))
        return
    print(format_figures(results))
    if classification:
        print(f"\n{classification.table()}")
    if suspicion:
        print("\n" + "\n".join(suspicion.describe()))
    if "generation" in results:
        table = results["generation"] | ({"people": results["people"]} if "people" in results else {})
        print(f"\n{config.generate} texts for each emotion; people: as many of the texts evaluated on")
        print(format_quality(table))
    if config.output_dir:
        print(f"\nsaved in {config.output_dir}")

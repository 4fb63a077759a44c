"""All that is told of a saved model: its figures on a split, and the quality of the texts that it writes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from emoft.config import EvaluateConfig
from emoft.data.duplicates import mark_duplicates
from emoft.data.reading import read_evaluation_splits
from emoft.data.tokenized import describe_cut, tokenize
from emoft.device import choose_device
from emoft.distributed.world import World
from emoft.errors import UserError, warn
from emoft.evaluate.classification import Classification, classify, label_scores, log_prior
from emoft.evaluate.confusion import confusion_map
from emoft.evaluate.independent import IndependentClassifier, fit_independent
from emoft.evaluate.judge import LanguageJudge, load_judge, mauve_beside_people, mauve_is_available
from emoft.evaluate.quality import Judges, TrainingTexts, assess, bare_texts, format_quality, people, sample
from emoft.evaluate.saved import load_text_model, read_format
from emoft.evaluate.scoring import evaluate, format_figures
from emoft.evaluate.suspects import Suspicion, cross_fitted, find_suspects, write_suspects
from emoft.files import (
    CONFUSION_FILE,
    EVALUATION_FILE,
    SAMPLES_FILE,
    SUSPECTS_FILE,
    finite,
    make_folder,
    write_json,
)
from emoft.model.kernels import keep_freed_memory
from emoft.model.loading import TextModel
from emoft.model.steering import build_steering
from emoft.terminal import Bar
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime


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
    judge = None
    if config.judge_model:
        judge = load_judge(config.judge_model, runtime, config.per_device_eval_batch_size)
        if not mauve_is_available():
            warn("no MAUVE without the package mauve-text: run pip install mauve-text")
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
        results |= write_and_assess(config, text_model, splits, runtime, judge)
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
    config: EvaluateConfig,
    text_model: TextModel,
    splits: dict[str, Dataset],
    runtime: Runtime,
    judge: LanguageJudge | None = None,
) -> dict[str, Any]:
    """Return the figures of sampled texts, "generation", those of people's, and how the classifiers do themselves."""
    text_format, batch_size = text_model.text_format, config.per_device_eval_batch_size
    train, results = splits.get("train"), dict[str, Any]()
    judges = Judges(language=judge)
    if train is None:
        warn("no train split: nothing can be said of copies, nor by an independent classifier; give --train_file")
    else:
        judges = Judges(TrainingTexts(train["text"]), fit_independent(train, text_format), judge)
        test = splits["test"].filter(
            lambda label: label in text_format.labels, input_columns="label", keep_in_memory=True
        )
        for kind, independent in judges.independent.items() if len(test) else ():
            found = independent.classify(test["text"], test["label"], text_format.labels).figures()
            results |= {f"{kind}_{name}": value for name, value in found.items() if name != "classified"}
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
    results["generation"] = assess(text_model, samples, runtime, batch_size, judges)
    # Twice as many as the model wrote, whose halves are compared with each other.
    human = people(text_model, list(splits["test"]["text"]), list(splits["test"]["label"]), 2 * config.generate)
    if human:
        # Some figures fall as texts become more: as many as the model wrote.
        few = {label: texts[: config.generate] for label, texts in human.items()}
        results["people"] = assess(text_model, few, runtime, batch_size, judges)["all"]
    if human and judge and mauve_is_available():
        pair = mauve_beside_people(judge, bare_texts(text_model, samples), bare_texts(text_model, human))
        if pair:
            results["generation"]["all"]["mauve"], results["people"]["mauve"] = pair
    return results


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
        print(f"\n{config.generate} texts for each emotion; people: at most as many of the texts evaluated on")
        print(format_quality(table))
    if config.output_dir:
        print(f"\nsaved in {config.output_dir}")

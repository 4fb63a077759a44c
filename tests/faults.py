"""Faults planted in runs of the real train.py, and what `python -m emoft.gradients` makes of them.

    python tests/faults.py                # the table of emoft/docs/faults.md: each fault with 3 seeds, 40 healthy runs
    python tests/faults.py --seeds 1 --only "one layer"    # some of it
    python tests/faults.py --tuning      # the seeds and sizes that the thresholds were chosen by, which are others

A fault is found if anything is said, and named rightly if what is said first is its cause. A healthy run about which
anything is said is a false alarm.
"""

import argparse
import csv
import json
import random
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import ROOT, WarmScripts

SAMPLE = ROOT / "emoft" / "sample"
Rows = list[tuple[str, str]]


def read_rows(split: str) -> Rows:
    with open(SAMPLE / f"{split}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Rows) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@dataclass
class Fault:
    """Something to go wrong, and what has to be said of it."""

    name: str
    causes: Sequence[str]  # findings of which one must be said first
    place: str = ""  # that the finding's chart must name, of a layer or a block
    step: tuple[int, int] | None = None  # from which to which the finding must name the first step
    flags: dict[str, object] = field(default_factory=dict)
    weights: str = ""  # statements that spoil `model` before the run
    rows: Callable[[Rows, random.Random], Rows] | None = None  # of train
    code: str = ""  # runs before train.py
    edit: tuple[str, str] | None = None  # a piece of train.py, and what takes its place
    fine_tunes: bool = False  # a model that was trained before, and not a fresh one


# Runs in the process of train.py, after the model is loaded.
ON_LOADING = """
import emoft.model.loading
load = emoft.model.loading.load_model_and_tokenizer
def planted(*args):
    model, tokenizer = load(*args)
{}
    return model, tokenizer
emoft.model.loading.load_model_and_tokenizer = planted
"""
# Multiplies the learning rate from a step on, behind the back of the flags.
FROM_STEP = """
import emoft.training.optimizer as optimizer
build = optimizer.build_schedule
def planted(*args):
    schedule = build(*args)
    factor = schedule.lr_lambdas[0]
    schedule.lr_lambdas[:] = [lambda step: factor(step) * ({} if step >= 60 else 1)] * len(schedule.lr_lambdas)
    return schedule
optimizer.build_schedule = planted
"""


def on_loading(*statements: str) -> str:
    return ON_LOADING.format("\n".join(f"    {statement}" for statement in statements))


def outlier(rows: Rows, chance: random.Random) -> Rows:
    """A text that is none, as a key or a picture that came into the wrong column."""
    strange = "".join(chance.choice(string.ascii_letters + string.digits) for _ in range(120))
    rows.insert(chance.randrange(len(rows)), (strange, "joy"))
    return rows


def shuffled(rows: Rows, chance: random.Random) -> Rows:
    labels = [label for _, label in rows]
    chance.shuffle(labels)
    return [(text, label) for (text, _), label in zip(rows, labels, strict=True)]


HIGH_RATE = ("learning_rate_too_high", "learning_rate_jumps")
SCALE = "torch.nn.Module.get_submodule(model, 'transformer.h.2.{}').weight.mul_({})"
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1")
FAULTS = [
    Fault("learning rate 30 times too high", HIGH_RATE, flags={"learning_rate": 0.1}),
    Fault("learning rate 1,000 times too high", HIGH_RATE, flags={"learning_rate": 3.0}),
    Fault("learning rate 3,000 times too low", ["learning_rate_too_low"], flags={"learning_rate": 1e-6}),
    Fault("learning rate 100 times higher from step 60 on", HIGH_RATE, step=(50, 80), code=FROM_STEP.format(100)),
    Fault(
        "learning rate 1,000 times lower from step 60 on",
        ["learning_rate_too_low", "learning_rate_jumps"],
        step=(50, 80),
        code=FROM_STEP.format(0.001),
    ),
    Fault(
        "a learning rate that never decays",
        ["schedule_not_followed"],
        edit=("                schedule.step()\n", "                pass\n"),
        flags={"warmup_steps": 0},
    ),
    Fault(
        "no warmup, at the rate of a healthy run with one, times 10",
        ["no_warmup", *HIGH_RATE],
        flags={"warmup_steps": 0, "learning_rate": 3e-2},
    ),
    Fault(
        "all weights 100 times too large",
        ["initialization_too_large"],
        weights="[p.mul_(100) for p in model.parameters()]",
    ),
    Fault(
        "all matrices 20 times too large",
        ["initialization_too_large"],
        weights="[p.mul_(20) for p in model.parameters() if p.dim() > 1]",
    ),
    Fault(
        "all matrices 100 times too small",
        ["initialization_too_small"],
        weights="[p.mul_(0.01) for p in model.parameters() if p.dim() > 1]",
    ),
    *(
        Fault(
            f"one layer 100 times too large: {layer}",
            ["layer_scale"],
            f"h02.{layer[:2] if 'ln' in layer else layer}",
            weights=SCALE.format(layer, 100),
        )
        for layer in LAYERS
    ),
    *(
        Fault(
            f"one layer 100 times too small: {layer}",
            ["layer_scale"],
            f"h02.{layer}",
            weights=SCALE.format(layer, 0.01),
        )
        for layer in LAYERS[:4]
    ),
    Fault(
        "the embedding 100 times too large", ["layer_scale"], "wte", weights="model.transformer.wte.weight.mul_(100)"
    ),
    Fault(
        "the positions 100 times too large", ["layer_scale"], "wpe", weights="model.transformer.wpe.weight.mul_(100)"
    ),
    Fault(
        "labels not shifted, in the loop",
        ["labels_misaligned"],
        edit=("targets = shift_labels(batch.labels)", "targets = batch.labels"),
    ),
    Fault(
        "labels shifted twice, in the loop",
        ["labels_misaligned"],
        edit=("targets = shift_labels(batch.labels)", "targets = shift_labels(shift_labels(batch.labels))"),
    ),
    Fault(
        "labels shifted twice, in the call of the loss",
        ["labels_misaligned"],
        edit=("targets, batch.predicting)", "shift_labels(targets), batch.predicting)"),
    ),
    Fault(
        "the first token of a text is a target, in the loop",
        ["labels_misaligned"],
        edit=(
            "targets = shift_labels(batch.labels)",
            "targets = shift_labels(batch.inputs['input_ids']); batch = __import__('dataclasses').replace(batch,"
            " predicting=torch.arange(targets.numel() - 1))",
        ),
    ),
    Fault("labels shuffled", ["labels_do_not_fit"], rows=shuffled),
    Fault("one text 600 times", ["texts_repeated"], rows=lambda rows, chance: [chance.choice(rows)] * 600),
    Fault("ten texts 60 times each", ["texts_repeated"], rows=lambda rows, chance: chance.sample(rows, 10) * 60),
    Fault(
        "a template so long that most of each text is cut away",
        ["texts_cut"],
        flags={"template": "you are a friend and you always answer in the mood that is asked for, " * 2 + "{text}"},
    ),
    Fault("one emotion", ["one_emotion"], rows=lambda rows, chance: [row for row in rows if row[1] == "joy"]),
    Fault("all labels the same", ["one_emotion"], rows=lambda rows, chance: [(text, "joy") for text, _ in rows]),
    Fault("evaluation on train texts", ["evaluated_on_train"], flags={"validation_file": SAMPLE / "train.csv"}),
    Fault(
        "an outlier",
        ["loss_spikes"],
        rows=outlier,
        flags={"logging_steps": 1, "max_steps": 500, "per_device_train_batch_size": 4},
    ),
    Fault("a block frozen", ["frozen"], "h01", code=on_loading("model.transformer.h[1].requires_grad_(False)")),
    Fault(
        "the gradient cut behind the second block",
        ["gradient_cut"],
        "h01",
        code=on_loading("model.transformer.h[1].register_forward_hook(lambda m, i, o: o.detach())"),
    ),
    Fault(
        "dead units in a block",
        ["dead_units", "layer_scale"],  # its biases are large
        "h02",
        weights="model.transformer.h[2].mlp.c_fc.bias.fill_(-8)",
    ),
    Fault(
        "queries and keys of a block 6 times too large",
        ["attention_stuck", "layer_scale"],
        "h02",
        weights="model.transformer.h[2].attn.c_attn.weight[:, :160].mul_(120)",
    ),
    Fault(
        "one number of a block's output grows without end",
        ["outlier_features"],
        "h02",
        code=on_loading(
            "calls = [0]",
            "def grow(module, inputs, output):",
            "    calls[0] += module.training",
            "    if calls[0] > 60:",
            "        output = output.clone()",
            "        output[..., 3] += 200.0",
            "    return output",
            "model.transformer.h[2].mlp.register_forward_hook(grow)",
        ),
    ),
    Fault(
        "a step of 256 texts that hold only eight",
        ["texts_repeated", "batch_too_large"],
        rows=lambda rows, chance: chance.sample(rows, 8) * 256,
        flags={"per_device_train_batch_size": 256, "max_steps": 40, "logging_steps": 2, "log_gradients_every": 4},
    ),
    Fault(
        "fine-tuning at 1,000 times the usual rate",
        ["pretraining_lost", *HIGH_RATE],
        flags={"learning_rate": 5e-2},
        fine_tunes=True,
    ),
    Fault("clipping at 0.0001", ["clipped_too_often"], flags={"max_grad_norm": 0.0001}),
    Fault(
        "fp16 overflows at every tenth step",
        ["skipped_too_often"],
        flags={"mixed_precision": "fp16", "max_steps": 60},
        code=on_loading(
            "calls = [0]",
            "def overflow(gradient):",
            "    calls[0] += 1",
            "    return gradient * float('inf') if calls[0] % 10 == 0 else gradient",
            "model.transformer.ln_f.weight.register_hook(overflow)",
        ),
    ),
    Fault(
        "a NaN in a weight",
        ["not_finite"],
        "h03",
        step=(1, 1),
        weights="model.transformer.h[3].attn.c_proj.weight[1, 1] = float('nan')",
    ),
    Fault(
        "an infinite position, which few texts reach",
        ["not_finite"],
        "wpe",
        weights="model.transformer.wpe.weight[34].fill_(float('inf'))",
        flags={"on_nonfinite": "skip"},
    ),
    Fault(
        "a NaN of the loop's own lines",
        ["not_finite"],
        "train.py",
        edit=("loss = losses.sum() / step.tokens", "loss = (losses - losses).sum() / 0 / step.tokens"),
    ),
    Fault(
        "dropout 0.9",
        ["dropout_too_strong"],
        code=on_loading("[setattr(m, 'p', 0.9) for m in model.modules() if type(m).__name__ == 'Dropout']"),
    ),
    Fault("weight decay 10", ["weights_decay"], flags={"weight_decay": 10}),
]


def healthy() -> dict[str, dict[str, object]]:
    """Configurations that nothing is wrong with, by name."""
    found: dict[str, dict[str, object]] = {}
    for layers, width in ((2, 64), (3, 96), (6, 48), (8, 64)):
        found[f"{layers} blocks of {width}"] = {"config_overrides": sizes(layers, width)}
    for batch, rate in ((2, 1e-3), (4, 2e-3), (16, 3e-3), (32, 4e-3)):
        found[f"batch {batch}"] = {"per_device_train_batch_size": batch, "learning_rate": rate}
    for schedule in ("linear", "cosine", "constant"):
        found[f"{schedule} schedule"] = {"lr_scheduler_type": schedule, "learning_rate": 2e-3}
        found[f"{schedule} schedule, long warmup"] = {"lr_scheduler_type": schedule, "warmup_steps": 0.4}
    for rate in (3e-4, 1e-3, 5e-3):
        found[f"learning rate {rate:g}"] = {"learning_rate": rate}
    for steps in (1, 2, 10, 25):
        found[f"logged every {steps} steps"] = {"logging_steps": steps}
    found |= {
        "fine-tuning": {"model_name_or_path": "pretrained", "learning_rate": 5e-4},
        "fine-tuning, slowly": {"model_name_or_path": "pretrained", "learning_rate": 5e-5},
        "no warmup": {"warmup_steps": 0, "learning_rate": 1e-3},
        "padded": {"batching": "padded"},
        "padded, accumulated": {
            "batching": "padded",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
        },
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "bf16": {"mixed_precision": "bf16"},
        "fp16": {"mixed_precision": "fp16", "max_steps": 60},
        "no clipping": {"max_grad_norm": 0},
        "clipped at 0.5": {"max_grad_norm": 0.5},
        "weight decay 0.1": {"weight_decay": 0.1},
        "label contrast": {"label_contrast": 0.2},
        "dropout 0.3": {"config_overrides": sizes(4, 64) + ",embd_pdrop=0.3,resid_pdrop=0.3,attn_pdrop=0.3"},
        "no dropout": {"config_overrides": sizes(4, 64) + ",embd_pdrop=0,resid_pdrop=0,attn_pdrop=0"},
        "no labels in the template": {"template": "{text}"},
        "label behind the text": {"template": "{text} = {label}"},
        "no evaluation": {"validation_file": "", "eval_steps": 0, "max_eval_samples": 0},
        "300 steps": {"max_steps": 300},
        "30 steps": {"max_steps": 30, "logging_steps": 2},
        "gradients not measured": {"log_gradients_every": 0},
        "two ranks": {"ranks": 2, "per_device_train_batch_size": 4},
        "two ranks, padded": {"ranks": 2, "per_device_train_batch_size": 2, "batching": "padded"},
        "resumed": {"resumed_at": 80},
        "resumed, batch 16": {"resumed_at": 110, "per_device_train_batch_size": 16},
        "demo, 4 epochs": {"config": "demo", "num_train_epochs": 4, "max_steps": -1},
        "demo": {"config": "demo", "num_train_epochs": 12, "max_steps": -1},
        "demo's flags, 1 epoch": {"config": "demo", "num_train_epochs": 1, "max_steps": -1},
    }
    return found


def sizes(layers: int, width: int) -> str:
    return f"n_layer={layers},n_embd={width},n_head=4,n_positions=64"


class Planter:
    """Runs faults and healthy configurations, and asks for their diagnosis."""

    def __init__(self, folder: Path, tuning: bool) -> None:
        self.folder, self.tuning = folder, tuning
        folder.mkdir(parents=True, exist_ok=True)
        self.scripts = WarmScripts(folder)

    def train(self, name: str, seed: int, settings: dict[str, object], fault: Fault | None = None) -> Path:
        """Train; returns the folder of the run."""
        place = self.folder / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"
        place.mkdir()
        rows = read_rows("train")
        if fault and fault.rows:
            rows = fault.rows(rows, random.Random(seed))
        values: dict[str, Any] = {
            "model_name_or_path": "",
            "config_overrides": sizes(4, 64) if self.tuning else sizes(5, 80),
            "vocab_size": 500 if self.tuning else 600,
            "train_file": write_rows(place / "train.csv", rows),
            "validation_file": SAMPLE / "validation.csv",
            "template": "{label}: {text}",
            "max_steps": 150,
            "max_eval_samples": 120,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 0.1,
            "logging_steps": 5,
            "log_gradients_every": 10,
            "eval_steps": 50,
            "save_steps": 0,
            "mixed_precision": "no",
            "max_length": 40,
            "seed": seed,
            "output_dir": place / "run",
            **settings,
        }
        ranks, resumed_at = values.pop("ranks", 0), values.pop("resumed_at", 0)
        if values["model_name_or_path"] or (fault and fault.fine_tunes):
            values |= {"model_name_or_path": self.pretrained(), "config_overrides": ""}
        if values.get("config"):
            kept = {"config", "num_train_epochs", "max_steps", "seed", "output_dir", "log_gradients_every"}
            values = {name: value for name, value in values.items() if name in kept}
        source = (ROOT / "train.py").read_text(encoding="utf-8")
        code = ""
        if fault:
            if fault.edit:
                assert source.count(fault.edit[0]) == 1, f"train.py has no such place any more: {fault.edit[0]!r}"
                source = source.replace(*fault.edit)
            code = fault.code
            if fault.weights:
                code += on_loading("import torch", "with torch.no_grad():", f"    {fault.weights}")
        (place / "planted.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n{source}")
        words = [f"--{name}={value}" for name, value in values.items()]
        if resumed_at:
            script = str(place / "planted.py")
            whole = self.scripts(script, *words, f"--save_steps={resumed_at}", "--save_total_limit=0", cwd=place)
            assert whole.code == 0, (name, whole.err[-2000:])
            for checkpoint in (place / "run").glob("checkpoint-*"):
                if checkpoint.name != f"checkpoint-{resumed_at}":
                    shutil.rmtree(checkpoint)
            words.append("--resume_from_checkpoint=latest")
        result = self.scripts(str(place / "planted.py"), *words, cwd=place, ranks=ranks)
        assert result.code in (0, 2), (name, result.err[-2000:])
        assert (place / "run/runs").exists(), (name, result.err[-2000:])
        return place / "run"

    def pretrained(self) -> Path:
        """Return a model that has learned something, made once."""
        made = self.folder / "pretrained-0" / "run"
        if not made.exists():
            self.train("pretrained", 0, {"max_steps": 300, "log_gradients_every": 0})
        return made

    def diagnose(self, run: Path) -> dict[str, Any]:
        result = self.scripts("-m", "emoft.gradients", str(run), "--json", cwd=self.folder)
        assert result.code == 0, result.err
        return json.loads(result.out)


def judge(fault: Fault, found: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether a fault was found, its cause said first, and its place and step right."""
    findings = found["findings"]
    if not findings:
        return False, False, False
    first = findings[0]
    named = first["name"] in fault.causes
    place = named and (not fault.place or fault.place in f"{first['tag']} {first['text']}")
    if fault.step:
        place = place and bool(first["steps"]) and fault.step[0] <= first["steps"][0] <= fault.step[1]
    return True, named, place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--keep", default="", help="a folder for the runs")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        table(arguments, Path(arguments.keep or temporary))


def table(arguments: argparse.Namespace, folder: Path) -> None:
    seeds = [(100 if arguments.tuning else 0) + number + 1 for number in range(arguments.seeds)]
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    configurations = {n: s for n, s in healthy().items() if arguments.only in f"healthy: {n}"}
    tasks: list[tuple[Fault | None, str, int, dict[str, object]]] = [
        (fault, fault.name, seed, fault.flags) for fault in faults for seed in seeds
    ]
    tasks += [(None, f"healthy: {name}", seeds[0], settings) for name, settings in configurations.items()]
    share = [tasks[number :: arguments.workers] for number in range(arguments.workers)]

    def work(number: int) -> list[tuple[Fault | None, str, int, dict[str, Any]]]:
        planter = Planter(folder / f"worker-{number}", arguments.tuning)
        done = []
        for fault, name, seed, settings in share[number]:
            done.append((fault, name, seed, planter.diagnose(planter.train(name, seed, settings, fault))))
            print(f"{name}, seed {seed}: {[each['name'] for each in done[-1][3]['findings']]}", file=sys.stderr)
        planter.scripts.close()
        return done

    with ThreadPoolExecutor(arguments.workers) as pool:
        results = [each for part in pool.map(work, range(arguments.workers)) for each in part]
    print("| fault | found | cause first | place and step | said first |\n| --- | --- | --- | --- | --- |")
    totals = [0, 0, 0]
    for fault in faults:
        found = [found for each, _, _, found in results if each is fault]
        judged = [judge(fault, each) for each in found]
        sums = [sum(column) for column in zip(*judged, strict=True)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)]
        said = sorted({each["findings"][0]["name"] if each["findings"] else "nothing" for each in found})
        print(f"| {fault.name} | " + " | ".join(f"{total}/{len(found)}" for total in sums) + f" | {', '.join(said)} |")
    count = max(1, len(faults) * len(seeds))
    print(f"\nfound {totals[0]} of {count}, cause said first {totals[1]}, place and step right {totals[2]}")
    alarms = {name: found["findings"] for fault, name, _, found in results if fault is None and found["findings"]}
    print(f"false alarms: {len(alarms)} of {len(configurations)} healthy runs")
    for name, findings in alarms.items():
        print(f"- {name}: {', '.join(each['name'] for each in findings)}")


if __name__ == "__main__":
    main()

"""What people bring, as it should not be: `python tests/fuzz.py [CASES [FIRST]]`.

Data files, file names, labels, caches, models, tokenizers, generation configs and checkpoints, each made hostile by
chance, go through the real scripts, in a process of their own. A case must succeed or end with exit code 2 and a line:
never a traceback, a crash, or more than 20 seconds, and nothing that a file holds is executed. Of a case that trains on
texts which are known, since the file was made from them, what reaches the model, decoded from its token ids, must be
these texts: nothing is silently something else.
"""

import csv
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import ROOT, WarmScripts
from safetensors.torch import load_file, save_file

SECONDS = 20.0  # none may take longer
MARKER = "executed"  # a file that hostile code would make
# The script as it is, but it notes what reaches the model: the tokens of the train split as text again.
PLANT = f"""
import json, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from emoft.data import tokenized
tokenize = tokenized.tokenize
def noting(rows, tokenizer, text_format, split):
    made = tokenize(rows, tokenizer, text_format, split)
    if split == "train":
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made["input_ids"]]
        with open("reached.json", "w") as file:
            json.dump(texts, file)
    return made
tokenized.tokenize = noting
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
Chance = random.Random


@dataclass
class Case:
    """Something hostile, ready to be tried."""

    what: str
    words: list[str]
    script: str = "planted.py"
    named: str = ""  # must stand in the line of a refusal
    texts: list[str] | None = None  # that must reach the model, if it trains; None: nobody knows
    must_train: bool = False
    must_be_refused: bool = False
    env: dict[str, str] = field(default_factory=dict)


# ---- Texts and labels ------------------------------------------------------------------------------------------------

ODD = [
    "\u00a0",
    "\u200b",
    "\u0301",
    "ភាសាខ្មែរ",
    "👩‍👩‍👧",
    "NaN",
    "null",
    "1e400",
    "-0",
    "'",
    '"',
    ";",
    ",",
    "|",
    "\\",
    "\\n",
    "{text}",
]
ODD += [
    "<|endoftext|>x",
    "é",
    "e\u0301",
    "\u2028",
    "\x85",
    "\x1c",
    "\x0b",
    "=1+1",
    "#",
    "%s",
    "\ufffd",
    "\u202e",
    "0x10",
    " ",
]
WORDS = ["i", "feel", "fine", "so", "sad", "today", "my", "heart", "is", "full"]
LABELS = ["joy", "sadness", "love", "anger"]


def text(chance: Chance) -> str:
    """A text of one line, with something odd in it more often than not."""
    words = [chance.choice(WORDS if chance.random() < 0.7 else ODD) for _ in range(chance.randint(1, 6))]
    made = chance.choice(["", " "]).join(words).replace("<|endoftext|>", "")
    return made if made.strip() else f"{made}x"


def rows_of(chance: Chance) -> list[tuple[str, str]]:
    return [(text(chance), chance.choice(LABELS)) for _ in range(chance.randint(1, 6))] + [("plain", "joy")]


def spelled(chance: Chance, label: str) -> str:
    """The same label as somebody else may write it."""
    return (
        chance.choice(["", " "])
        + chance.choice([label, unicodedata.normalize("NFD", label)])
        + chance.choice(["", " "])
    )


def table(rows: list[tuple[str, str]], chance: Chance, delimiter: str, quote_all: bool) -> str:
    made = io.StringIO()
    order = chance.choice([["text", "label"], ["label", "text"], ["id", "text", "label"]])
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(
        made, order, delimiter=delimiter, lineterminator=chance.choice(["\n", "\r\n"]), quoting=quoting
    )
    writer.writerow({name: chance.choice([name, f" {name}"]) if not quote_all else name for name in order})
    for number, (each, label) in enumerate(rows):
        row = {"text": each, "label": spelled(chance, label), "id": number}
        writer.writerow({name: row[name] for name in order})
    return made.getvalue()


def file_of(rows: list[tuple[str, str]], chance: Chance, ending: str) -> tuple[bytes, list[str]]:
    """The content of a file that holds these rows, and the flags it is read with."""
    if ending in (".csv", ".tsv"):
        delimiter = "\t" if ending == ".tsv" else chance.choice([",", ";"])
        flags = ["--delimiter=;"] if delimiter == ";" else []
        return table(rows, chance, delimiter, quote_all=True).encode(), flags
    if ending == ".txt":
        return (
            chance.choice(["\n", "\r\n", "\r"]).join(f"{each};{spelled(chance, label)}" for each, label in rows) + "\n"
        ).encode(), ["--delimiter=;"]
    objects: list[dict[str, Any]] = [{"text": each, "label": spelled(chance, label)} for each, label in rows]
    for each in objects:
        if chance.random() < 0.5:  # what nobody reads may be anything
            each["more"] = chance.choice([1, "x", None, [1, "x"], {"deep": [{}]}, 1e308, True])
    if ending == ".parquet":
        sink = io.BytesIO()
        kind = chance.choice([pa.string(), pa.large_string(), pa.string_view()])
        columns = {name: pa.array([each[name] for each in objects], kind) for name in ("text", "label")}
        pq.write_table(pa.table(columns), sink, row_group_size=chance.choice([1, 2, 100]))
        return sink.getvalue(), []
    escaped = chance.random() < 0.5
    if ending == ".jsonl":
        return "\n".join(json.dumps(each, ensure_ascii=escaped) for each in objects).encode(), []
    return json.dumps(objects, ensure_ascii=escaped, indent=chance.choice([None, 2])).encode(), []


ENDINGS = [".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet"]


def filled(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{label}: {each}" for each, label in rows]


# ---- Kinds of cases --------------------------------------------------------------------------------------------------


def sound_data(chance: Chance, folder: Path) -> Case:
    """Odd texts in a sound file."""
    rows, ending = rows_of(chance), chance.choice(ENDINGS)
    content, flags = file_of(rows, chance, ending)
    mark = b"\xef\xbb\xbf" if ending in (".csv", ".tsv", ".txt", ".json", ".jsonl") and chance.random() < 0.3 else b""
    (folder / f"data{ending}").write_bytes(mark + content)
    words = [f"--train_file=data{ending}", "--template={label}: {text}", *flags]
    # A character that ends a line for some readers may end one for ours only in a quoted cell or a string.
    return Case(f"sound {ending}", words, texts=filled(rows), must_train=True)


def damaged_data(chance: Chance, folder: Path) -> Case:
    """A file with bytes changed, cut off, or of another format than its name says."""
    ending = chance.choice(ENDINGS)
    content, flags = file_of(rows_of(chance), chance, chance.choice([ending, chance.choice(ENDINGS)]))
    place = chance.randrange(len(content))
    insert = chance.choice([b"\x00", b"\xff", b"\xed\xa0\x80", b'"', b"\n", b"{", b"]", bytes(chance.randbytes(5))])
    how = chance.choice(["cut", "insert", "random", "huge", "repeat"])
    content = {
        "cut": content[:place],
        "insert": content[:place] + insert + content[place:],
        "random": chance.randbytes(chance.randint(1, 300)),
        "huge": chance.choice([b"i feel ", b"x", b"\x00", "ភា".encode(), b'"', b"["]) * 1_500_000,
        "repeat": content * 2,
    }[how]
    (folder / f"data{ending}").write_bytes(content)
    template = chance.choice(["{text}", "{label}: {text}"])
    return Case(
        f"damaged {ending}, {how}", [f"--train_file=data{ending}", f"--template={template}", *flags], named="data"
    )


def odd_values(chance: Chance, folder: Path) -> Case:
    """Labels and texts of every type that JSON has: only what is a text and a label may be trained on."""
    values: list[Any] = [
        1,
        0,
        1.0,
        1.5,
        True,
        None,
        "",
        " ",
        [],
        ["joy"],
        {},
        {"a": 1},
        "joy",
        -1,
        10**30,
        "\ud800",
        "NaN",
    ]
    rows = [{"text": f"row {n}", "label": chance.choice(values)} for n in range(chance.randint(1, 4))]
    if chance.random() < 0.3:
        rows[0]["text"] = chance.choice(values)
    rows += [{"text": "plain", "label": "joy"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def is_label(value: Any) -> bool:
        if isinstance(value, str):
            return "\ud800" not in value
        return value is None or isinstance(value, int) or (isinstance(value, float) and value.is_integer())

    def name(value: Any) -> str:
        return value.strip() if isinstance(value, str) else str(int(value) if isinstance(value, float) else value)

    sound = all(is_label(row["label"]) and (row["text"] is None or isinstance(row["text"], str)) for row in rows)
    sound &= not any("\ud800" in str(row["text"]) for row in rows)
    whole = [row for row in rows if str(row["text"] or "").strip() and row["label"] is not None and name(row["label"])]
    texts = [f"{name(row['label'])}: {row['text']}" for row in whole]
    words = ["--train_file=data.jsonl", "--template={label}: {text}"]
    return Case("odd values", words, named="data.jsonl", texts=texts, must_be_refused=not sound)


NAMES = [
    "train[1]",
    "a*b",
    "a?b",
    "a::b",
    "with space",
    "ភាសា",
    "quote'd",
    'dou"ble',
    "per%20cent",
    "#hash",
    "{x}",
    "a&b",
]
NAMES += [
    "new\nline",
    "~tilde",
    "-dash",
    "dot.ted",
    "hub://x",
    "file:x",
    "zip::x",
    "[!a]",
    "**",
    "train-00000-of-00001",
    "e\u0301",
]


def odd_names(chance: Chance, folder: Path) -> Case:
    """A name that somebody takes for a pattern or an address, with another file beside it that would match."""
    rows, ending, name = rows_of(chance), chance.choice(ENDINGS), chance.choice(NAMES)
    content, flags = file_of(rows, chance, ending)
    path = folder / chance.choice(["", "a[b]", "sub dir"]) / f"{name.replace('/', '_')}{ending}"
    path.parent.mkdir(exist_ok=True)
    decoy, _ = file_of([("the wrong file", "joy")] * 2, chance, ending)
    for other in ("train1", "axb", "a", "b", "x", "with", "train"):
        (path.parent / f"{other}{ending}").write_bytes(decoy)
    path.write_bytes(content)
    flag = chance.choice([str(path), os.path.join(".", path.relative_to(folder))])
    words = [f"--train_file={flag}", "--template={label}: {text}", *flags]
    return Case(f"name {name!r}", words, texts=filled(rows), must_train=True)


def odd_cache(chance: Chance, folder: Path) -> Case:
    """A cache that holds another file of the same name, time and size, or that somebody has damaged."""
    rows = rows_of(chance)
    content, flags = file_of(rows, chance, ".jsonl")
    path = folder / "data.jsonl"
    other = b'{"text": "the wrong file", "label": "joy"}\n{"text": "wrong", "label": "love"}\n'
    path.write_bytes(other + b" " * max(0, len(content) - len(other)))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    words = ["--train_file=data.jsonl", "--template={label}: {text}", *flags]
    yield_first = Case("first run", [*words, "--output_dir=first"])
    run_case(SCRIPTS[0], folder, yield_first)
    path.write_bytes(content)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return Case("cache of another file", words, texts=filled(rows), must_train=True)


def pickled(folder: Path) -> bytes:
    """Weights that run code when they are loaded the old way."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
            return os.system, (f"touch {folder / MARKER}",)

    made = io.BytesIO()
    torch.save({"transformer.wte.weight": Bomb()}, made)
    return made.getvalue()


def change_json(chance: Chance, path: Path) -> str:
    """Change a value, drop one, or add one that libraries would act upon; returns what was done."""
    try:
        content = json.loads(path.read_text())
    except ValueError:  # it was cut before
        return "again"
    key = chance.choice(sorted(content)) if content else "x"
    code = "custom.Thing"
    added = {
        "auto_map": {"AutoConfig": code, "AutoModelForCausalLM": code, "AutoTokenizer": [code, code]},
        "tokenizer_class": chance.choice(["BertTokenizer", "Nothing", 5]),
        "num_beams": 4,
        "temperature": 0.1,
        "repetition_penalty": chance.choice([1.7, -1, "x"]),
        "tie_word_embeddings": False,
        "architectures": ["GPT2Model"],
        "torch_dtype": "float16",
        "extra_special_tokens": chance.choice([["<x>"], {"a": "<x>"}]),
        "model_max_length": chance.choice([3, 1e30, "x"]),
    }
    how = chance.choice(["drop", "change", "add", "cut"])
    if how == "drop":
        content.pop(key, None)
    elif how == "change":
        content[key] = chance.choice([None, 0, -1, 1e9, "x", [], {}, True, 10**20])
    elif how == "add":
        key = chance.choice(sorted(added))
        content[key] = added[key]
    made = json.dumps(content)
    path.write_text(made[: chance.randrange(len(made))] if how == "cut" else made)
    return f"{how} {key} of {path.name}"


def odd_model(chance: Chance, folder: Path) -> Case:
    """A model whose files do not say what they should, with code beside them that must never run."""
    model = folder / "hostile"
    shutil.copytree(MODEL[0], model)
    for name in ("custom.py", "modeling_gpt2.py", "tokenization_gpt2.py", "configuration_gpt2.py"):
        (model / name).write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass Thing: pass\n")
    (model / "pytorch_model.bin").write_bytes(pickled(folder))
    done = []
    for _ in range(chance.randint(1, 2)):
        kind = chance.choice(["weights", "json", "json", "json", "no safetensors"])
        if kind == "json":
            done.append(change_json(chance, chance.choice(sorted(set(model.glob("*.json"))))))
        elif kind == "no safetensors":
            (model / "model.safetensors").unlink(missing_ok=True)
            done.append(kind)
        elif (model / "model.safetensors").exists():
            done.append(change_weights(chance, model / "model.safetensors"))
    rows = [("i feel fine", "joy"), ("so sad today", "sadness")]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": each, "label": label}) for each, label in rows))
    words = ["--model_name_or_path=hostile", "--max_length=40"]
    script = chance.choice(["planted.py", "planted.py", "generate.py", "emoft.evaluate"])
    if script == "generate.py":
        words += [chance.choice(["--emotion=joy", "--prompt=i feel"]), "--do_sample"]
    elif script == "emoft.evaluate":
        words += ["--test_file=data.jsonl"]
    else:
        words += ["--train_file=data.jsonl", "--template={label}: {text}"]
    refused = any(each == "a part left out" for each in done)
    texts = filled(rows) if not any("tokenizer.json" in each for each in done) else None
    return Case(f"model: {'; '.join(done)}", words, script, texts=texts, must_be_refused=refused)


def change_weights(chance: Chance, path: Path) -> str:
    try:
        weights = load_file(path)
    except Exception:  # it was changed before
        return "again"
    name = chance.choice(sorted(weights))
    how = chance.choice(["prefix", "a part left out", "another shape", "NaN", "half", "more", "cut"])
    if how == "prefix":
        weights = {
            f"{chance.choice(['_orig_mod.', 'module.', 'model.'])}{key}": value for key, value in weights.items()
        }
        how = "a part left out"
    elif how == "a part left out":
        del weights[name]
    elif how == "another shape":
        weights[name] = torch.zeros(3, 5)
    elif how == "NaN":
        weights[name] = torch.full_like(weights[name], float("nan"))
    elif how == "half":
        weights = {key: value.half() for key, value in weights.items()}
    elif how == "more":
        weights["transformer.h.7.attn.c_attn.weight"] = torch.zeros(8, 24)
    save_file(weights, path, metadata={"format": "pt"})
    if how == "cut":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return how


def odd_checkpoint(chance: Chance, folder: Path) -> Case:
    """A checkpoint with a file changed, cut, missing or exchanged; what is damaged is never loaded."""
    shutil.copytree(RUN[0], folder / "run")
    (folder / "train.txt").write_text(RUN_DATA)
    newest = folder / "run" / "checkpoint-4"
    path = chance.choice(sorted(each for each in newest.iterdir() if each.is_file()))
    how = chance.choice(["cut", "flip", "remove", "swap", "code", "json"])
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: chance.randrange(max(1, len(content)))])
    elif how == "flip" and content:
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    elif how == "remove":
        path.unlink()
    elif how == "swap":
        path.write_bytes((folder / "run" / "checkpoint-2" / path.name).read_bytes())
    elif how == "code":
        (newest / "training_state.pt").write_bytes(pickled(folder))
    else:
        json_files = sorted(newest.glob("*.json"))
        change_json(chance, chance.choice(json_files))
    words = [*RUN_WORDS, "--output_dir=run"]
    words += [chance.choice(["--resume_from_checkpoint=latest", "--resume_from_checkpoint=run/checkpoint-4"])]
    return Case(f"checkpoint: {how} {path.name}", words)


KINDS: list[Callable[[Chance, Path], Case]] = [
    *(sound_data, damaged_data, odd_values, odd_names, odd_cache),
    *(odd_model, odd_model, odd_checkpoint),
]
RUN_DATA = "".join(
    f"i feel {word} {n};{label}\n" for n in range(4) for word, label in zip(WORDS, LABELS * 3, strict=False)
)
RUN_WORDS = ["--train_file=train.txt", "--delimiter=;", "--template={label}: {text}", "--max_steps=6", "--save_steps=2"]
RUN_WORDS += ["--save_total_limit=0", "--max_length=24"]
SCRIPTS: list[WarmScripts] = []
MODEL: list[Path] = []
RUN: list[Path] = []


# ---- Trying them -----------------------------------------------------------------------------------------------------


def run_case(scripts: WarmScripts, folder: Path, case: Case) -> str:
    """Try a case; returns how it ended."""
    words = list(case.words)
    (folder / "planted.py").write_text(PLANT)
    (folder / "reached.json").unlink(missing_ok=True)
    if case.script == "planted.py":
        usual = ["--max_steps=1", "--save_steps=0", "--mixed_precision=no", "--use_cpu", "--output_dir=run"]
        given = {word.partition("=")[0] for word in words}
        words += [word for word in usual if word.partition("=")[0] not in given]
        if "--model_name_or_path" not in given:
            words += [f"--model_name_or_path={MODEL[0]}"]
        if "--max_length" not in given:
            words += ["--max_length=512"]
    script = ["-m", case.script] if case.script.startswith("emoft.") else [case.script]
    if case.script == "planted.py":
        script = [str(folder / "planted.py")]
    started = time.monotonic()
    result = scripts(*script, *words, cwd=folder, **case.env)
    told = (case.what, case.words, result.code, result.err[-2000:])
    assert time.monotonic() - started < SECONDS, told
    assert result.code in (0, 2), told
    assert "Traceback" not in result.err, told
    assert not (folder / MARKER).exists(), told
    assert not (case.must_train and result.code), told
    assert not (case.must_be_refused and not result.code), told
    if result.code == 2:
        assert " error: " in result.error_lines[-1], told
        assert case.named in result.error_lines[-1] or "--delimiter" in result.error_lines[-1], told
        return "refused"
    if case.script == "planted.py" and case.texts is not None:
        reached = json.loads((folder / "reached.json").read_text())
        assert Counter(reached) == Counter(case.texts), (told, reached, case.texts)
        return "the right texts"
    return "accepted"


def main(cases: int, scripts: WarmScripts, folder: Path, first: int = 0) -> Counter[str]:
    """Try so many cases; returns how many ended in which way."""
    SCRIPTS[:], MODEL[:] = [scripts], [tiny_model(folder / "m")]
    (folder / "begun").mkdir()
    (folder / "begun" / "train.txt").write_text(RUN_DATA)
    RUN[:] = [folder / "begun" / "run"]
    run_case(scripts, folder / "begun", Case("a run to resume", RUN_WORDS, must_train=True))
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(first, first + cases):
        chance, place = Chance(number), folder / str(number)
        place.mkdir()
        kind = KINDS[number % len(KINDS)]
        try:
            outcomes[f"{kind.__name__}: {run_case(scripts, place, kind(chance, place))}"] += 1
        except AssertionError as error:
            wrong.append(f"case {number}: {error}")
            print(wrong[-1][:3000], flush=True)
        shutil.rmtree(place)
    assert not wrong, f"{len(wrong)} of {cases} cases are wrong: {wrong}"
    return outcomes


def tiny_model(folder: Path) -> Path:
    """Write a model of one block, 8 wide, for texts of up to 512 tokens, with a text format of ours."""
    from emoft.data.template import TextFormat
    from emoft.model.loading import fresh_model
    from emoft.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["any text"], 300)
    fresh_model("n_layer=1,n_embd=8,n_head=1,n_positions=512", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TextFormat("{label}: {text}", labels=LABELS).save(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        scripts = WarmScripts(Path(name))
        numbers = [int(word) for word in sys.argv[1:]] or [1000]
        for outcome, count in sorted(main(numbers[0], scripts, Path(name), *numbers[1:2]).items()):
            print(f"{count:5} {outcome}")
        scripts.close()

"""Everything a user can get wrong ends in one line that says what, where and what to do, with exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from datasets import Dataset
from transformers import GPT2LMHeadModel, GPT2Tokenizer

GOOD = "text,label\ni feel fine,joy\ni feel bad,sadness\n"


def refused(result: Result, *parts: str) -> None:
    """The result is one line of error that holds all the parts, and warnings at most besides."""
    assert result.code == 2, (result.code, result.out, result.err)
    assert "Traceback" not in result.err
    errors = [line for line in result.error_lines if not line.startswith("warning: ")]
    assert len(errors) == 1, result.err
    for part in parts:
        assert part in errors[0], errors[0]


@pytest.fixture
def train(run: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> Callable[..., Result]:
    """train.py on files in `tmp_path`; whatever is wrong, no output folder may come of it."""

    def train_on(*words: object) -> Result:
        (tmp_path / "good.csv").write_text(GOOD)
        given = {str(word).split("=")[0] for word in words}
        defaults = {
            "--model_name_or_path": tiny_model,
            "--train_file": "good.csv",
            "--max_steps": 1,
            "--output_dir": "out",
        }
        result = run("train.py", *[f"{flag}={value}" for flag, value in defaults.items() if flag not in given], *words)
        if result.code:
            assert not (tmp_path / "out").exists(), "nothing may be written before all is checked"
        return result

    return train_on


FLAGS = [
    (["--config=nope"], ["--config nope", "demo"]),
    (["--learning_rte=1"], ["--learning_rte", "--learning_rate"]),
    (["--learning_rate=fast"], ["--learning_rate", "fast"]),
    (["--learning_rate=nan"], ["--learning_rate", "above 0"]),
    (["--learning_rate=-1"], ["--learning_rate", "above 0"]),
    (["--per_device_train_batch_size=0"], ["--per_device_train_batch_size", "at least 1"]),
    (["--gradient_accumulation_steps=1.5"], ["--gradient", "1.5"]),
    (["--mixed_precision=int8"], ["int8", "bf16"]),
    (["--append_eos=perhaps"], ["--append_eos", "perhaps"]),
    (["--adam_beta1=1"], ["--adam_beta1", "below 1"]),
    (["--max_length=1"], ["--max_length 1", "at least 2"]),
    (["--max_length=129"], ["--max_length 129", "128 positions"]),
    (["--max_length=3", "--template=The emotion: {text}"], ["--max_length 3", "The emotion:"]),
    (["--warmup_steps=2"], ["--warmup_steps 2", "1 steps"]),
    (["--template=Emotion"], ["--template", "{text}"]),
    (["--template={text} {mood}"], ["{mood}", "{label}"]),
    (["--template={text} {"], ["--template", "malformed"]),
    (["--template={text.__class__}"], ["--template"]),
    (["--config_overrides=n_layer=2"], ["--config_overrides", "--model_name_or_path"]),
    (["--model_name_or_path=", "--vocab_size=300", "--config_overrides=n_leyer=2"], ["n_leyer", "n_layer=4"]),
    (["--model_name_or_path=", "--vocab_size=300", "--config_overrides=n_layer"], ["--config_overrides"]),
    (["--model_name_or_path=", "--vocab_size=300", "--config_overrides=n_embd=9,n_head=2"], ["--config_overrides"]),
    (["--vocab_size=100"], ["--vocab_size 100", "257"]),
    (["--eval_steps=1"], ["--eval_steps", "--validation_file"]),
    (["--resume_from_checkpoint=nowhere"], ["--resume_from_checkpoint nowhere", "check the path"]),
    (["--resume_from_checkpoint=latest", "--overwrite_output_dir"], ["contradict"]),
    (["--train_file=", "--validation_file=good.csv"], ["--train_file"]),
    (["--train_file=", "--dataset_name="], ["--train_file", "--config demo"]),
    (["--train_file=", "--dataset_name=./nowhere"], ["--dataset_name ./nowhere", "no such folder"]),
    (["--model_name_or_path=./nowhere"], ["--model_name_or_path ./nowhere", "no such folder"]),
    (["--model_name_or_path=good.csv"], ["good.csv", "folder"]),
    (["--tokenizer_name=./nowhere"], ["--tokenizer_name ./nowhere", "no such folder"]),
    (["--label_contrast=0.2"], ["--label_contrast", "{label}"]),
]


@pytest.mark.parametrize(("words", "parts"), FLAGS, ids=[" ".join(words) for words, _ in FLAGS])
def test_flags(train: Callable[..., Result], words: list[str], parts: list[str]) -> None:
    refused(train(*words), *parts)


FILES = [
    ("missing.csv", None, [], ["--train_file missing.csv", "no such file"]),
    ("data.xlsx", "a", [], ["data.xlsx", ".csv"]),
    ("data.csv", "", [], ["data.csv", "empty"]),
    ("data.csv", "text,label\n", [], ["data.csv", "no example"]),
    ("data.csv", "message,label\na,b\n", [], ["data.csv", "'text'", "message", "--text_column"]),
    ("data.csv", GOOD, ["--template={label} {text}", "--label_column=mood"], ["'mood'", "--label_column"]),
    ("data.csv", 'text,label\n"",a\n  ,b\n', [], ["data.csv", "every row", "text"]),
    ("data.csv", GOOD + "a,b,c\n", [], ["data.csv line 4", "3 fields", "double quotes"]),
    ("data.csv", GOOD + "a\n", [], ["data.csv line 4", "1 fields"]),
    ("data.csv", GOOD + '"a,b\n', [], ["data.csv line 4"]),
    ("data.csv", "text,text\na,b\n", [], ["data.csv", "same name"]),
    ("data.csv", GOOD, ["--delimiter=::"], ["--delimiter", "single character"]),
    ("data.csv", GOOD, ["--column_names", "text"], ["data.csv line 1", "2 fields instead of 1"]),
    ("data.csv", b"text,label\nfine,a\nna\xefve,b\n", [], ["data.csv line 3", "UTF-8"]),
    ("data.txt", b"fine\nna\xefve\n", [], ["data.txt line 2", "UTF-8"]),
    ("data.jsonl", b'{"text": "fine"}\n{"text": "na\xefve"}\n', [], ["data.jsonl line 2", "UTF-8"]),
    ("data.txt", "fine;joy\n\nbad\n", ["--delimiter=;"], ["data.txt line 3", "';'"]),
    ("data.txt", "\n\n \n", [], ["data.txt", "every row"]),
    ("data.jsonl", '{"text": "fine"}\n{"text": \n', [], ["data.jsonl"]),
    ("data.jsonl", '{"text": 1}\n{"text": 2}\n', [], ["data.jsonl", "'text'", "not text"]),
    ("data.jsonl", '{"text": null}\n', [], ["data.jsonl", "every row"]),
    ("data.jsonl", '{"text": {"a": "b"}}\n', [], ["data.jsonl", "not text"]),
    ("data.parquet", "no parquet", [], ["data.parquet"]),
]


@pytest.mark.parametrize(("name", "content", "words", "parts"), FILES, ids=range(len(FILES)))
def test_data_files(
    train: Callable[..., Result], tmp_path: Path, name: str, content: str | bytes | None, words: list, parts: list
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(train(f"--train_file={name}", *words), *parts)


def test_a_folder_as_file(train: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(train("--train_file=folder"), "--train_file folder", "is a folder")


def test_rows_without_text_are_counted_and_skipped(train: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "gaps.csv").write_text("text,label\nfine,a\n,b\n  ,c\nbad,d\n")
    Dataset.from_dict({"text": ["fine", None, "bad"]}).to_parquet(tmp_path / "gaps.parquet")
    result = train("--train_file=gaps.csv", "--validation_file=gaps.parquet")
    assert result.code == 0, result.err
    warnings = [line for line in result.error_lines if line.startswith("warning: ")]
    assert warnings == [
        "warning: gaps.csv: skipped 2 of 4 rows, which have no text: row 2, 3",
        "warning: gaps.parquet: skipped 1 of 3 rows, which have no text: row 2",
    ]
    assert "2 examples" in result.out


YAML = [
    ("learning_rate: fast\n", ["run.yaml", "--learning_rate"]),
    ("leerning_rate: 1\n", ["run.yaml", "--leerning_rate", "--learning_rate"]),
    ("- 1\n- 2\n", ["run.yaml", "flag: value"]),
    ("a: [\n", ["run.yaml", "YAML"]),
    ("learning_rate: -1\n", ["--learning_rate"]),
    ("!!python/object/apply:os.system [touch marker]\n", ["run.yaml"]),
]


@pytest.mark.parametrize(("content", "parts"), YAML, ids=range(len(YAML)))
def test_yaml(train: Callable[..., Result], tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    refused(train("--config=run.yaml"), *parts)
    assert not (tmp_path / "marker").exists()


class TestOutputDir:
    def test_that_holds_a_run(self, run: Callable[..., Result], train: Callable[..., Result], tmp_path: Path) -> None:
        assert train().code == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("out/**/*") if path.is_file()}
        words = ["--train_file=good.csv", "--model_name_or_path=out", "--output_dir=out", "--max_steps=1"]
        refused(run("train.py", *words), "out", "--resume_from_checkpoint latest", "--overwrite_output_dir")
        assert {path: path.read_bytes() for path in tmp_path.rglob("out/**/*") if path.is_file()} == before

    def test_that_is_a_file(self, train: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("mine")
        refused(train("--output_dir=taken"), "--output_dir taken", "is a file")
        refused(train("--output_dir=taken/below"), "--output_dir taken/below", "cannot be written")
        assert (tmp_path / "taken").read_text() == "mine"


class TestModels:
    @pytest.fixture
    def folder(self, tiny_model: Path, tmp_path: Path) -> Path:
        GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
        GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_without_a_file(self, train: Callable[..., Result], folder: Path) -> None:
        for name, told in [
            ("tokenizer.json", "tokenizer"),
            ("model.safetensors", "model"),
            ("config.json", "config.json"),
        ]:
            (folder / name).rename(folder / "hidden")
            refused(train(f"--model_name_or_path={folder}"), "--model_name_or_path", str(folder), told)
            (folder / "hidden").rename(folder / name)

    def test_with_damaged_weights(self, train: Callable[..., Result], folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        refused(train(f"--model_name_or_path={folder}"), str(folder))

    def test_of_another_kind(self, train: Callable[..., Result], folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        refused(train(f"--model_name_or_path={folder}"), "bert", "GPT-2")

    def test_with_a_tokenizer_that_does_not_belong(
        self, train: Callable[..., Result], folder: Path, tmp_path: Path
    ) -> None:
        from emoft.model.tokenizer import train_tokenizer

        train_tokenizer(["a b c d e f"] * 9, 260).save_pretrained(tmp_path / "small")
        assert train(f"--tokenizer_name={tmp_path / 'small'}", "--output_dir=out1").code == 0, (
            "a few spare ids are allowed"
        )
        train_tokenizer([" ".join(f"{i}{i * 7919}" for i in range(2000))], 1200).save_pretrained(tmp_path / "large")
        result = train(f"--tokenizer_name={tmp_path / 'large'}")
        refused(result, "1200 tokens", "do not belong together")


class TestGenerate:
    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A trained folder whose template names no emotion."""
        from emoft.data.template import TextFormat

        folder = tmp_path_factory.mktemp("plain")
        for path in tiny_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        TextFormat("Emotion: {text}").save(folder)
        return folder

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--prompt=a", "--emotion=joy"], ["--prompt and --emotion"]),
            (["--text=a"], ["--text", "--emotion"]),
            (["--emotion=joy"], ["names no emotion", "--prompt", "{label}"]),
            (["--prompts_file=nowhere.txt"], ["--prompts_file nowhere.txt", "check the path"]),
            (["--prompt=" + "a b " * 100], ["prompt 1", "--max_length 100"]),
            (["--max_length=129"], ["129", "128 positions"]),
            (["--max_new_tokens=500"], ["128 positions"]),
            (["--interactive", "--json"], ["--interactive", "drop --json"]),
            (["--num_return_sequences=2"], ["--num_return_sequences", "--do_sample"]),
            (["--temperature=0"], ["--temperature", "above 0"]),
            (["--top_p=1.5"], ["--top_p", "at most 1"]),
            (["--batch_size=0"], ["--batch_size"]),
        ],
        ids=range(12),
    )
    def test_flags(self, run: Callable[..., Result], plain: Path, words: list[str], parts: list[str]) -> None:
        refused(run("generate.py", f"--model_name_or_path={plain}", *words), *parts)

    def test_a_message_offers_nothing_that_the_script_has_not(self, run: Callable[..., Result], plain: Path) -> None:
        missing = run("generate.py", "--model_name_or_path=nowhere", "--emotion=joy")
        refused(missing, "nowhere: no such folder")
        for result in (
            missing,
            run("generate.py", "--model_name_or_path=nobody/nothing"),
            run("generate.py", f"--model_name_or_path={plain}", "--emotion=joy"),
        ):
            assert result.code == 2
            line = result.error_lines[-1]
            assert "--config" not in line or "train.py --config" in line, line

    def test_without_a_model(self, run: Callable[..., Result]) -> None:
        refused(run("generate.py"), "gpt2-emotion-finetuned", "train")
        refused(run("generate.py", "--model_name_or_path=./nowhere"), "./nowhere", "no such folder")

    def test_an_emotion_the_model_does_not_know(self, run: Callable[..., Result], plain: Path, tmp_path: Path) -> None:
        from emoft.data.template import TextFormat

        for path in plain.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        TextFormat("{label}: {text}", labels=["joy", "fear"]).save(tmp_path)
        refused(run("generate.py", "--model_name_or_path=.", "--emotion=envy"), "'envy'", "joy, fear")
        refused(run("generate.py", "--model_name_or_path=.", "--emotion=faer"), "'faer'", "did you mean fear?")
        (tmp_path / "emoft.json").write_text("{")
        refused(run("generate.py", "--model_name_or_path=.", "--emotion=joy"), "emoft.json")
        (tmp_path / "emoft.json").unlink()
        refused(run("generate.py", "--model_name_or_path=.", "--emotion=joy"), "emoft.json", "--prompt")

    def test_prompts_that_are_not_utf8(self, run: Callable[..., Result], plain: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_bytes(b"fine\nna\xefve\n")
        refused(run("generate.py", f"--model_name_or_path={plain}", "--prompts_file=prompts.txt"), "line 2", "UTF-8")
        (tmp_path / "prompts.txt").write_bytes(b"\n\n")
        refused(run("generate.py", f"--model_name_or_path={plain}", "--prompts_file=prompts.txt"), "no prompt")


def test_torchruns_own_report_ends_with_the_line(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("train.py", "--learning_rate=-1", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert result.code == 2
    report = json.loads((tmp_path / "error.json").read_text())
    assert report["message"] == result.error_lines[-1]
    assert report["message"].startswith("train.py: error: --learning_rate -1")
    assert isinstance(report["timestamp"], int)

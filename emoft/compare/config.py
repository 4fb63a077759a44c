"""The flags of the comparison of two models."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from emoft.config import EvaluateConfig
from emoft.flags import Command, Count, CountOrOff, File, Name, NameOrFolder, option


@dataclass
class CompareConfig:
    """The flags of `python -m emoft.compare`."""

    command: ClassVar[Command] = Command(
        "emoft.compare",
        "Tell which of two models is better on the same texts: loss or bits per byte, accuracy and macro F1, with"
        " intervals of the differences. Several seeds of one recipe are compared as a group: A1,A2,A3 B1,B2,B3.",
        {
            "python -m emoft.compare emoft-demo emoft-demo-2 --test_file texts.csv": "two models",
            "python -m emoft.compare a1,a2,a3 b1,b2,b3 --test_file texts.csv": "two recipes, of three seeds each",
        },
    )

    models_a: str = option(
        "", "folders that train.py wrote, or models of the Hub, with commas between", positional=True
    )
    models_b: str = option("", "those to compare with", positional=True)

    dataset_name: NameOrFolder = option(
        "dair-ai/emotion", "a data set on the Hub or in a folder; --test_file goes before it", begins_group="Data"
    )
    dataset_config_name: Name = option(
        "", "the configuration of dataset_name (empty: its only one; split of dair-ai/emotion)"
    )
    dataset_revision: Name = option("main", "branch, tag or commit of a dataset_name on the Hub")
    split: Name = option("test", "the split of dataset_name to compare on")
    test_file: File = option("", "a file to compare on, of the kinds that train.py reads")
    delimiter: str = option("", "as for train.py")
    column_names: list[Name] = option([], "as for train.py")
    text_column: Name = option("text", "the column that holds the messages")
    label_column: Name = option("label", "the column that holds the emotions; read only if a template has {label}")
    max_eval_samples: CountOrOff = option(0, "compare on the first so many examples (0: all)")

    texts: CountOrOff = option(
        5, "show so many texts on which each is better by most (0: none)", begins_group="Output and speed"
    )
    json: bool = option(False, "print one object of JSON")
    per_device_eval_batch_size: Count = option(32, "texts computed at once")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "no", "as for train.py; no gives the same figures on every machine"
    )
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")

    def groups(self) -> tuple[list[str], list[str]]:
        """Return the models on each side."""
        first, second = ([n.strip() for n in names.split(",") if n.strip()] for names in (self.models_a, self.models_b))
        return first, second

    def of_evaluation(self, model: str) -> EvaluateConfig:
        """Return the flags with which a model is evaluated."""
        names = set(EvaluateConfig.__dataclass_fields__) & set(self.__dataclass_fields__) - {"command"}
        return EvaluateConfig(model_name_or_path=model, **{name: getattr(self, name) for name in names})

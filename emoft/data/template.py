"""One example -> the text the model sees. The format is saved beside the model, so that generation uses the same."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from emoft.data.labels import clean_label
from emoft.errors import UserError
from emoft.files import FORMAT_FILE
from emoft.suggestions import suggest


@dataclass(frozen=True)
class TextFormat:
    """How examples become texts.

    `template` holds `{text}` and, for conditioned models, `{label}`. `labels` are the names a `{label}` can take, in
    the order of the data set (empty without `{label}`). With `append_eos` the end-of-text token follows the text;
    then both are cut to `max_length` tokens.
    """

    template: str
    append_eos: bool = True
    max_length: int = 64
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise ValueError(f"template is {self.template!r}, not a string")
        fields = template_fields(self.template)
        if "text" not in fields:
            raise UserError(f"--template {self.template!r} has no {{text}}: put {{text}} where the message belongs")
        for name in fields:
            if name not in ("text", "label"):
                raise UserError(
                    f"--template {self.template!r} has the unknown field {{{name}}}: use {{text}} and {{label}}"
                )

    @property
    def has_label(self) -> bool:
        """Whether the text names the emotion, so that generation can be conditioned on it."""
        return "label" in template_fields(self.template)

    def fill(self, text: str, label: str = "") -> str:
        """Return the text of one example, without the end-of-text token."""
        return self.template.format(text=text, label=label)

    @property
    def label_first(self) -> bool:
        """Whether the emotion stands before the text, and so can steer what is generated."""
        return "label" in template_fields(self.split("text")[0])

    def split(self, name: str) -> tuple[str, str]:
        """Return what stands before and after the first field of a name, as templates themselves."""
        before, after, found = "", "", False
        for literal, each, _, _ in Formatter().parse(self.template):
            piece = literal.replace("{", "{{").replace("}", "}}")
            if each == name and not found:
                before, found = before + piece, True
                continue
            piece += f"{{{each}}}" if each is not None else ""
            before, after = (before, after + piece) if found else (before + piece, after)
        return before, after

    def conditioned_from(self, text: str, label: str) -> int:
        """Return the place in a filled template where that begins whose probability tells labels apart, in characters.

        It is the text if the label stands before it, else the label.
        """
        before, _ = self.split("text" if self.label_first else "label")
        return len(before.format(text=text, label=label))

    def prompt(self, label: str = "", text: str = "") -> str:
        """Return what stands before the words to be generated: the template up to the end of its `{text}`.

        Trailing blanks are dropped, because GPT-2's tokens carry the blank in front of a word.

        Raises:
            UserError: the template or the label cannot condition a generation.
        """
        if label:
            if not self.has_label:
                raise UserError(
                    f"the model was trained with the template {self.template!r}, which names no emotion: give --prompt"
                    " instead of --emotion, or train with {label} in it, as train.py --config conditional does"
                )
            if not self.label_first:
                raise UserError(
                    f"the template {self.template!r} names the emotion after the text, so it cannot steer what is"
                    " generated: give --prompt instead, or train with {label} before {text}"
                )
            label = self.known_label(label)
            if label not in self.labels:
                near = suggest(label, self.labels)
                raise UserError(f"no emotion {label!r} in this model{near}: choose from {', '.join(self.labels)}")
        return (self.split("text")[0].format(label=label) + text).rstrip()

    def known_label(self, label: str) -> str:
        """Return the label of the model that a user means, who may write blanks around it or compose it otherwise."""
        cleaned = {clean_label(known): known for known in self.labels}
        return label if label in self.labels else cleaned.get(clean_label(label), label)

    def mixture(self, emotion: str) -> dict[str, float]:
        """Return the shares of emotions, which sum to 1: of "joy" all, of "joy:0.7,surprise:0.3" those.

        Raises:
            UserError: it is neither, or the model does not know one of them.
        """
        if self.known_label(emotion) in self.labels or not (set(emotion) & set(",:")):
            self.prompt(emotion)
            return {self.known_label(emotion): 1.0}
        shares: dict[str, float] = {}
        for part in emotion.split(","):
            name, _, number = part.rpartition(":")
            label = self.known_label(name.strip())
            try:
                share = float(number)
            except ValueError:
                share = 0.0
            if not label or not 0 < share < float("inf") or label in shares:
                raise UserError(
                    f"--emotion {emotion!r} is no mixture: write each emotion once with a share above 0, as in"
                    " joy:0.7,surprise:0.3"
                )
            self.prompt(label)
            shares[label] = share
        return {label: share / sum(shares.values()) for label, share in shares.items()}

    def prompts(self) -> dict[str, str]:
        """Return the prompt of each emotion; of a template that cannot be steered a single one, of the name "text"."""
        return {label: self.prompt(label) for label in self.labels} if self.label_first else {"text": self.prompt()}

    def extract(self, filled: str, label: str = "") -> str:
        """Return the text in a filled template that may have ended early."""
        before, after = (part.format(label=label, text="") for part in self.split("text"))
        text = filled.removeprefix(before) if filled.startswith(before) else filled.removeprefix(before.rstrip())
        return (text.rpartition(after)[0] if after.strip() and after in text else text).strip()

    def save(self, folder: Path) -> None:
        """Write the format beside a saved model."""
        content = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / FORMAT_FILE).write_text(content + "\n", encoding="utf-8")

    def check_types(self) -> None:
        """See that the fields hold what they should, which the file may have got from an editor.

        Raises:
            ValueError: one does not.
        """
        expected = {"append_eos": "true or false", "max_length": "a whole number above 0"}
        is_right = {
            "append_eos": isinstance(self.append_eos, bool),
            "max_length": type(self.max_length) is int and self.max_length > 0,
        }
        for name, right in is_right.items():
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not {expected[name]}")
        if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels is {str(self.labels)[:40]}, not a list of strings")

    @classmethod
    def load(cls, folder: Path, name: str = "") -> "TextFormat":
        """Read the format saved beside a model.

        Args:
            folder: of the model.
            name: that the user gave it, if it is not the folder's.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        path = folder / FORMAT_FILE
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            found.check_types()
            return found
        except FileNotFoundError:
            raise UserError(
                f"{name or folder} has no {FORMAT_FILE}, which holds its template: give --prompt instead of --emotion"
            ) from None
        except (TypeError, ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): copy it again from the training run") from None


def template_fields(template: str) -> list[str]:
    """Return the names between braces, in order; `{{` and `}}` stand for braces themselves.

    Raises:
        UserError: braces do not match.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"--template {template!r} is malformed ({error}): write a brace that is text twice, {{{{"
        ) from None
    # A format or conversion ("{text!r}", "{text:>9}") is no field of ours either.
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]

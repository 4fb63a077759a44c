"""What the libraries do not promise to keep is still as emoft takes it, and is taken in one place only."""

import ast
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, read_scalars
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.tensorboard import FileWriter, SummaryWriter, summary

from emoft.data.tokens import byte_of_character
from emoft.private import (
    fingerprint_of,
    flash_attention,
    go_offline,
    int8_product,
    packed_product,
    packs,
    restart_marks,
)

UNDOCUMENTED = (  # modules that have no page in their library's documentation; emoft has found public ways around them
    "tensorboard.compat",
    "transformers.convert_slow_tokenizer",
    "transformers.integrations",
    "transformers.masking_utils",
)


@contextmanager
def there(name: str) -> Iterator[None]:
    """Say in a sentence, instead of in a traceback, that a name is gone or takes other arguments."""
    try:
        yield
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        pytest.fail(f"{name} is gone, or no longer what it was: look for another way in emoft/private.py ({error})")


def test_the_fingerprint_of_rows() -> None:
    rows = Dataset.from_dict({"text": ["i feel fine", "i feel sad"]})
    again = Dataset.from_dict({"text": ["i feel fine", "i feel sad"]})
    others = [
        Dataset.from_dict({"text": ["i feel fine", "i feel bad"]}),
        rows.select([1]),
        rows.select([0]),
        rows.rename_column("text", "label"),
        rows.map(lambda row: {"text": row["text"].upper()}),
    ]
    with there("datasets.Dataset._fingerprint"):
        assert fingerprint_of(rows) == fingerprint_of(again), "a second run would tokenize the same rows again"
        different = {fingerprint_of(each) for each in (rows, *others)}
    assert len(different) == 1 + len(others), "rows that differ share a fingerprint: new data would get an old cache"


def test_flash_attention_with_dropout() -> None:
    """On no device at all, which checks names, shapes and that gradients reach all three; a GPU computes the rest."""
    query, key, value = (torch.zeros(9, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in "qkv")
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32, device="meta")
    with there("torch.ops.aten._flash_attention_forward"):
        output = flash_attention(query, key, value, boundaries, longest=5, dropout=0.1, scaling=None)
        assert (output.shape, output.dtype) == (query.shape, query.dtype), "its first result is no longer the output"
        output.float().sum().backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None, "it has no gradient any more"


def test_going_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with there("huggingface_hub.constants.HF_HUB_OFFLINE, or the same in datasets.config,"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
        go_offline()
    assert huggingface_hub.is_offline_mode(), "huggingface_hub asks the Hub, though it was told not to"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError) as caught:
        datasets.load_dataset("someone/something")
    assert "OfflineModeIsEnabled" in str(caught.value), "datasets asks the Hub, though it was told not to"


def test_what_was_logged_before_a_restart_is_hidden(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "runs")
    with there("Event or SessionLog of tensorboard.compat.proto.event_pb2"):
        first, again = restart_marks(1), restart_marks(3)
    for mark in first:
        writer.add_event(mark)
    for step in (1, 2, 3, 4):
        writer.add_summary(summary.scalar("train/loss", step), step)
    for mark in again:
        writer.add_event(mark)
    writer.add_summary(summary.scalar("train/loss", 50), 5)
    writer.flush()
    writer.close()
    curve = read_scalars(tmp_path)["train/loss"]
    assert curve == {1: 1, 2: 2, 5: 50}, "TensorBoard shows both what came before a restart and what came after it"


def test_marks_of_a_restart_are_those_of_a_summary_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    monkeypatch.setattr(FileWriter, "add_event", lambda self, event: written.append(event))
    SummaryWriter(str(tmp_path), purge_step=3)
    assert written == restart_marks(3), "SummaryWriter tells TensorBoard of a restart in another way"


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_by_packed_weights(rows: int) -> None:
    torch.manual_seed(1)
    weight, bias, values = torch.randn(24, 40), torch.randn(40), torch.randn(rows, 24)
    expected = values @ weight
    with there("torch.ops.mkldnn._linear_pointwise"):
        assert packs(torch.device("cpu"), torch.float32)
        packs(torch.device("cpu"), torch.bfloat16), packs(torch.device("cpu"), torch.float16)
        assert torch.allclose(packed_product(weight, None)(values), expected, atol=1e-4)
        activated = F.gelu(expected + bias, approximate="tanh")
        assert torch.allclose(packed_product(weight, bias, gelu=True)(values), activated, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_products_in_eight_bits(rows: int) -> None:
    torch.manual_seed(1)
    weight, bias, values = torch.randn(24, 40), torch.randn(40), torch.randn(rows, 24)
    weight[:, 3] = 0  # an output of zeros must not be divided by its largest weight
    expected = values @ weight + bias
    with there("torch.ao.nn.quantized.dynamic.Linear"), warnings.catch_warnings():
        warnings.simplefilter("error")  # its deprecation is known, and no user can do anything about it
        found = int8_product(weight, bias)(values)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.std()


def test_the_bytes_that_characters_of_a_token_stand_for() -> None:
    """As the tokenizer itself spells bytes. The table in transformers, `bytes_to_unicode`, is not documented."""
    table = byte_of_character()
    assert sorted(table) == sorted(ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    text = "".join(map(chr, range(0x800))) + "ភ័យ 😀"  # holds each byte that is not its own character
    spelt = "".join(part for part, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    assert bytes(table[character] for character in spelt) == text.encode()


def private_names(path: Path) -> list[str]:
    """Names in a file that their library keeps to itself: with an underscore, or of an undocumented module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and f"{owner}.{node.attr}" != "os._exit":  # which Python documents
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{each.name}" if module else each.name for each in node.names]
            found += [
                name
                for name in names
                if name.startswith(UNDOCUMENTED)
                or (any(part.startswith("_") for part in name.split(".")) and module not in ("__future__", "_typeshed"))
            ]
    return found


def test_private_names_stand_in_one_module() -> None:
    paths = [ROOT / "train.py", ROOT / "generate.py", *(ROOT / "emoft").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): names for path in paths if (names := private_names(path))}
    assert set(found.pop("emoft/private.py")) == {
        "rows._fingerprint",
        "torch.ops.aten._flash_attention_forward",
        "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        "torch.ops.mkldnn._is_mkldnn_fp16_supported",
        "torch.ops.mkldnn._linear_pointwise",
        "torch.ops.mkldnn._reorder_linear_weight",
        "tensorboard.compat.proto.event_pb2.Event",
        "tensorboard.compat.proto.event_pb2.SessionLog",
    }
    assert found == {}, "use a public name, or put it into emoft/private.py, with a test"

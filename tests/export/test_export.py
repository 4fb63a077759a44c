"""`python -m emoft.export`: what other programs read is the same model, and the same tokens."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, Result, run_fresh
from tokenizers import pre_tokenizers
from transformers import AddedToken, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from emoft.errors import UserError
from emoft.export.to_gguf import write_gguf
from emoft.export.to_onnx import write_onnx
from emoft.export.writing import export
from emoft.files import write_whole
from emoft.model.loading import load_model
from emoft.model.tokenizer import load_tokenizer

TEXTS = ["Emotion: i feel fine, it's 12", "ខ្ញុំសប្បាយចិត្ត 😀", "<|joy|> un café <|endoftext|>"]


class TestGguf:
    @pytest.fixture(scope="class")
    @classmethod
    def odd_model(cls, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Added tokens, rows to spare, a head of its own, and an inner width of its own."""
        folder = tmp_path_factory.mktemp("odd")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_tokens(["café"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|joy|>"]})
        tokenizer.save_pretrained(folder)
        torch.manual_seed(1)
        shape = {"n_layer": 3, "n_embd": 48, "n_head": 3, "n_positions": 64, "n_inner": 80}
        config = GPT2Config(vocab_size=410, tie_word_embeddings=False, layer_norm_epsilon=1e-3, **shape)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return folder

    @pytest.fixture(params=["tiny_model", "odd_model"])
    def exported(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, gguf.GGUFReader]:
        folder = request.getfixturevalue(request.param)
        size = export(str(folder), tmp_path / "model.gguf", "gguf")
        assert size == (tmp_path / "model.gguf").stat().st_size
        return folder, gguf.GGUFReader(tmp_path / "model.gguf")

    def test_a_model_made_of_it_has_the_same_logits(self, exported: tuple[Path, gguf.GGUFReader]) -> None:
        folder, reader = exported

        def value(key: str) -> int:
            return reader.fields[f"gpt2.{key}"].contents()

        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
        tied = "output.weight" not in tensors
        config = GPT2Config(
            vocab_size=len(reader.fields["tokenizer.ggml.tokens"].contents()),
            n_layer=value("block_count"), n_embd=value("embedding_length"), n_head=value("attention.head_count"),
            n_positions=value("context_length"), n_inner=value("feed_forward_length"),
            layer_norm_epsilon=value("attention.layer_norm_epsilon"), tie_word_embeddings=tied,
        )  # fmt: skip
        rebuilt = GPT2LMHeadModel(config)
        # The names are written out, as llama.cpp reads them: those of the library could change with the export.
        names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
                 "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
                 "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
        weights = {}
        for name in rebuilt.state_dict():
            head, _, kind = name.removeprefix("transformer.").rpartition(".")
            block, _, layer = head.removeprefix("h.").partition(".") if head.startswith("h.") else ("", "", head)
            if tied and name == "lm_head.weight":
                continue
            weight = tensors.pop((f"blk.{block}." if block else "") + f"{names[layer]}.{kind}")
            weights[name] = weight.T if layer.startswith(("attn.", "mlp.")) and kind == "weight" else weight
        assert tensors == {}, "nothing is left over"
        assert rebuilt.load_state_dict(weights, strict=False).missing_keys == (["lm_head.weight"] if tied else [])
        ids = torch.randint(0, config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = load_model(str(folder)).eval()(ids).logits
            assert torch.equal(rebuilt.eval()(ids).logits, ours)

    def test_a_tokenizer_made_of_it_makes_the_same_tokens(self, exported: tuple[Path, gguf.GGUFReader]) -> None:
        folder, reader = exported
        ours = load_tokenizer(str(folder))

        def value(key: str):
            return reader.fields[f"tokenizer.ggml.{key}"].contents()

        tokens, kinds = value("tokens"), value("token_type")
        added = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
        # Its model knows those that are made by merging; the others are found in the text before.
        known = {token: number for number, token in enumerate(tokens) if kinds[number] == gguf.TokenType.NORMAL}
        known[ours.eos_token] = ours.eos_token_id
        rebuilt = GPT2Tokenizer(vocab=known, merges=[tuple(pair.split()) for pair in value("merges")])
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in added and token != ours.eos_token:
                rebuilt.add_tokens(AddedToken(token, special=kind == gguf.TokenType.CONTROL))
        assert [rebuilt(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]
        assert {token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL} == set(
            ours.all_special_tokens
        )
        assert kinds.count(gguf.TokenType.UNUSED) == len(tokens) - len(ours)
        assert (value("model"), value("pre")) == ("gpt2", "gpt-2")
        assert value("bos_token_id") == value("eos_token_id") == ours.eos_token_id
        assert value("add_bos_token") is False

    @pytest.mark.parametrize(
        ("setting", "told"),
        [
            ({"activation_function": "relu"}, "activation_function is relu"),
            ({"scale_attn_by_inverse_layer_idx": True}, "attention is scaled"),
            ({"scale_attn_weights": False}, "attention is scaled"),
        ],
    )
    def test_another_architecture_is_refused(self, tiny_model: Path, tmp_path: Path, setting: dict, told: str) -> None:
        folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **setting}))
        with pytest.raises(UserError, match=told):
            export(str(folder), tmp_path / "model.gguf", "gguf")
        assert list(tmp_path.iterdir()) == [folder]

    def test_so_is_another_tokenizer(self, tiny_model: Path, tmp_path: Path) -> None:
        model, tokenizer = load_model(str(tiny_model)), load_tokenizer(str(tiny_model))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        with pytest.raises(UserError, match="llama.cpp would make other tokens"):
            write_gguf(model, tokenizer, tmp_path / "model.gguf")
        tokenizer = load_tokenizer(str(tiny_model))
        tokenizer.add_tokens(AddedToken("word", single_word=True))
        with pytest.raises(UserError, match="'word' takes the blanks"):
            write_gguf(model, tokenizer, tmp_path / "model.gguf")


class TestOnnx:
    @pytest.fixture(scope="class")
    @classmethod
    def file(cls, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        export(str(tiny_model), path, "onnx")
        return path

    @pytest.fixture(scope="class")
    @classmethod
    def logits(cls, file: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def compute(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            return torch.from_numpy(found)

        return compute

    @pytest.mark.parametrize("shape", [(1, 1), (1, 17), (5, 3), (2, 128)])
    def test_it_computes_the_same_logits(self, logits, tiny_model: Path, shape: tuple[int, int]) -> None:
        ids = torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = load_model(str(tiny_model)).eval()(ids).logits
        assert torch.allclose(logits(ids, torch.ones_like(ids)), ours, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side_changes_nothing(self, logits, tiny_model: Path, side: str) -> None:
        ids = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        kept = slice(8, None) if side == "left" else slice(None, -8)
        mask[0] = 0
        mask[0, kept] = 1
        with torch.no_grad():
            alone = load_model(str(tiny_model)).eval()(ids[:1, kept]).logits
        assert torch.allclose(logits(ids, mask)[:1, kept], alone, atol=1e-4, rtol=0)

    def test_the_file_is_valid_small_and_names_no_place(self, file: Path, tiny_model: Path) -> None:
        onnx.checker.check_model(file)
        content = file.read_bytes()
        assert str(ROOT).encode() not in content and sys.prefix.encode() not in content
        assert len(content) < (tiny_model / "model.safetensors").stat().st_size * 1.5, "tied weights stand in it once"

    def test_more_than_a_file_can_hold_is_refused(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(n_embd=1280, n_layer=36, n_head=20))  # gpt2-large
        with pytest.raises(UserError, match="export it as .gguf"):
            write_onnx(model, None, tmp_path / "model.onnx")


class TestTheCommand:
    def test_it_writes_one_file(self, run: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
        result = run("-m", "emoft.export", tiny_model, "--output=model.bin", "--format=gguf")
        assert result.code == 0, result.err
        assert result.out.startswith("saved model.bin (")
        assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
        assert gguf.GGUFReader(tmp_path / "model.bin").tensors

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ([], "name a model and a file"),
            (["{model}"], "name a model and a file"),
            (["{model}", "--output=model.bin"], "end it in .onnx or .gguf"),
            (["{model}", "--output=there.gguf"], "--overwrite_output"),
            (["{model}", "--output=."], "its ending tells no format"),
            (["{model}", "--output=.", "--format=onnx"], "is a folder"),
            (["{model}", "--output=nowhere/model.gguf"], "there is no folder"),
            (["./nowhere", "--output=model.gguf"], "error: ./nowhere: no such folder"),
            (["nobody/nothing", "--output=model.gguf"], "error: nobody/nothing: no such folder"),
            (["{model}", "--output=model.gguf", "--format=ggml"], "choose auto, onnx or gguf"),
        ],
    )
    def test_mistakes_are_told_in_a_line(
        self, run: Callable[..., Result], tiny_model: Path, tmp_path: Path, words: list[str], told: str
    ) -> None:
        (tmp_path / "there.gguf").write_text("mine")
        result = run("-m", "emoft.export", *(word.format(model=tiny_model) for word in words))
        (line,) = [line for line in result.error_lines if "error" in line]
        assert result.code == 2 and told in line, line
        assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
        assert (tmp_path / "there.gguf").read_text() == "mine"

    @pytest.mark.parametrize(("ending", "packages"), [("gguf", "gguf"), ("onnx", "onnx onnxscript")])
    def test_a_missing_package_is_told_before_anything_is_loaded(
        self, tiny_model: Path, tmp_path: Path, ending: str, packages: str
    ) -> None:
        (tmp_path / "start.py").write_text(
            "import runpy, sys\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            f"sys.modules[{packages.split()[-1]!r}] = None\n"
            "runpy.run_module('emoft.export', run_name='__main__', alter_sys=True)\n"
        )
        result = run_fresh(tmp_path / "start.py", tiny_model, f"--output=model.{ending}", cwd=tmp_path)
        assert result.code == 2
        (line,) = result.err.splitlines()
        assert line.endswith(f"pip install {packages}")

    def test_what_fails_leaves_the_file_of_before(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_text("before")

        def write_half(path: Path) -> None:
            path.write_text("half")
            raise OSError("no space left")

        with pytest.raises(OSError, match="no space"):
            write_whole(tmp_path / "model.gguf", write_half)
        assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
        assert (tmp_path / "model.gguf").read_text() == "before"

"""Ways to generate, each as a function that continues prompts: emoft's, transformers', and other libraries'."""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.benchmark.config import BenchmarkConfig
from emoft.device import choose_device
from emoft.model.decoding import Decoder, build_decoder
from emoft.model.generation import choose_generation_precision, encode_prompt, generate_all
from emoft.model.sampling import Sampling
from emoft.training.precision import Precision

TEMPERATURE, TOP_K = 0.7, 50  # the pipeline's
PACKAGES = {"CTranslate2": "ctranslate2", "ONNX Runtime": "onnxruntime"}  # which take part where they are installed

# Continues prompts by at most so many tokens each, and returns how many it made: texts may end before.
Continue = Callable[[list[str], int], int]


@dataclass
class Setting:
    """What a contender is given."""

    model: GPT2LMHeadModel
    tokenizer: GPT2Tokenizer
    device: torch.device
    config: BenchmarkConfig

    def precision(self, texts: int) -> Precision:
        """Return that of emoft and of those that compute like it, as generate.py chooses it."""
        return choose_generation_precision(self.config.mixed_precision, self.device, texts)

    def drawing(self) -> dict[str, Any]:
        """Return how tokens are chosen, by the words of `GenerationConfig`."""
        draws = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        return {"do_sample": False} if self.config.greedy else draws


def by_emoft(setting: Setting, int8: bool = False) -> Continue:
    """As generate.py does."""
    model = setting.model.to(setting.device).eval()  # type: ignore[arg-type]  # a fault of the library's types
    decoders: dict[str, Decoder] = {}  # by precision

    def _generate(prompts: list[str], count: int) -> int:
        precision = setting.precision(len(prompts))
        if precision.name not in decoders:
            decoders[precision.name] = build_decoder(model, precision, int8)
        decoder = decoders[precision.name]
        options: dict[str, Any] = setting.drawing()
        results = generate_all(decoder, setting.tokenizer, prompts, len(prompts), max_new_tokens=count, **options)
        return sum(result.new_tokens + result.finished for (result,) in results)

    return _generate


def up_to(end: int, row: list[int]) -> int:
    """Return the number of tokens up to the first end-of-text, itself included."""
    return row.index(end) + 1 if end in row else len(row)


def by_generate(setting: Setting) -> Continue:
    """As one would by hand: padded on the left, `model.generate` under autocast."""
    model = setting.model.to(setting.device).eval()  # type: ignore[arg-type]  # a fault of the library's types
    end = setting.tokenizer.eos_token_id

    def _generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        width = max(map(len, texts))
        ids = torch.tensor([[end] * (width - len(text)) + text for text in texts], device=setting.device)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=setting.device)
        with setting.precision(len(prompts)).autocast():
            output: Any = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                pad_token_id=end,
                **setting.drawing(),
            )
        setting.tokenizer.batch_decode(output[:, width:])
        return sum(up_to(end, row) for row in output[:, width:].tolist())

    return _generate


def by_pipeline(setting: Setting, batched: bool) -> Continue:
    """By transformers' pipeline: in one batch and in emoft's precision, or as it is by its defaults."""
    from transformers import pipeline  # here, since emoft itself has no use for it

    generator: Any = pipeline(
        "text-generation", model=setting.model, tokenizer=setting.tokenizer, device=setting.device
    )
    # It pads on the left by itself; without a token to pad with it refuses a batch.
    setting.tokenizer.pad_token = setting.tokenizer.eos_token

    def _generate(prompts: list[str], count: int) -> int:
        options = {"max_new_tokens": count, **setting.drawing()}
        if batched:
            with setting.precision(len(prompts)).autocast():
                results = generator(prompts, batch_size=len(prompts), return_tensors=True, **options)
        else:
            results = generator(prompts, return_tensors=True, **options)
        end, made = setting.tokenizer.eos_token_id, 0
        for prompt, (result,) in zip(prompts, results, strict=True):
            row, own = result["generated_token_ids"], len(encode_prompt(setting.tokenizer, prompt))
            padding = next((place for place, token in enumerate(row) if token != end), 0)
            setting.tokenizer.decode(row[padding + own :])
            made += up_to(end, row[padding + own :])
        return made

    return _generate


def by_ctranslate2(setting: Setting, compute_type: str) -> Continue:
    """By CTranslate2, from the model that its converter makes."""
    import ctranslate2  # only where it is installed

    with tempfile.TemporaryDirectory() as folder:
        setting.model.save_pretrained(folder)
        # It wants a name for each token that the model has; in a copy, since to look for them in texts takes long.
        tokenizer = copy.deepcopy(setting.tokenizer)
        missing = setting.model.config.vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<unused-{number}>" for number in range(missing)])
        tokenizer.save_pretrained(folder)
        ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/converted")
        generator = ctranslate2.Generator(
            f"{folder}/converted",
            device=setting.device.type,
            compute_type=compute_type,
            intra_threads=torch.get_num_threads(),
        )

    def _generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        results = generator.generate_batch(
            [setting.tokenizer.convert_ids_to_tokens(text) for text in texts],
            max_length=count,
            include_prompt_in_result=False,
            sampling_topk=1 if setting.config.greedy else TOP_K,
            sampling_temperature=1.0 if setting.config.greedy else TEMPERATURE,
        )
        setting.tokenizer.batch_decode([result.sequences_ids[0] for result in results])
        # Of a text that has ended, its end-of-text is a token that was made, but is not among them.
        return sum(min(count, len(result.sequences_ids[0]) + 1) for result in results)

    return _generate


def by_onnx(setting: Setting, int8: bool) -> Continue:
    """By ONNX Runtime, from a graph of one step with its cache."""
    from emoft.benchmark.onnx_generation import OnnxGenerator  # only where the packages are installed

    generator = OnnxGenerator(setting.model, int8)
    end, sampling = setting.tokenizer.eos_token_id, Sampling(**setting.drawing())

    def _generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        rows = generator.generate(texts, count, end, sampling).tolist()
        setting.tokenizer.batch_decode(rows)
        return sum(up_to(end, row) for row in rows)

    return _generate


def contenders_of(config: BenchmarkConfig) -> dict[str, tuple[Callable[..., Continue], tuple[Any, ...]]]:
    """Return by name what takes part here, with its arguments; emoft first."""
    found: dict[str, tuple[Callable[..., Continue], tuple[Any, ...]]] = {
        "emoft": (by_emoft, ()),
        "model.generate": (by_generate, ()),
        "pipeline, all in a batch": (by_pipeline, (True,)),
        "pipeline, by its defaults": (by_pipeline, (False,)),
    }
    on_cpu = choose_device(config.use_cpu).type == "cpu"
    if importlib.util.find_spec("ctranslate2"):
        found["CTranslate2, float32"] = by_ctranslate2, ("float32",)
        found |= {"CTranslate2, int8": (by_ctranslate2, ("int8",))} if on_cpu else {}
    if on_cpu and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        found["ONNX Runtime, float32"] = by_onnx, (False,)
        found["ONNX Runtime, int8"] = by_onnx, (True,)
    return found | ({"emoft, --quantize int8": (by_emoft, (True,))} if on_cpu else {})

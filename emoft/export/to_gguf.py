"""GPT-2 and its tokenizer as GGUF, the file that llama.cpp reads: names, keys and layout are those of its converter.

See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and, in llama.cpp, the GPT2Model of conversion/gpt2.py.
"""

import json
from pathlib import Path

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from emoft.errors import UserError

# Linear layers that GPT-2 keeps as (inputs, outputs), and GGUF as (outputs, inputs).
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one formula, GELU by tanh


def write_gguf(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a model in float32 and its tokenizer as GGUF.

    Args:
        model: any GPT-2 that llama.cpp computes as transformers does.
        tokenizer: GPT-2's kind, with added tokens or without.
        path: of the file.

    Raises:
        UserError: llama.cpp would compute another model, or make other tokens.
        OSError: the file cannot be written.
    """
    import gguf  # here, since it is an optional package

    refuse_what_differs(model, tokenizer)
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    names, types = [], []
    added = tokenizer.added_tokens_decoder
    name_of = {number: name for name, number in tokenizer.get_vocab().items()}
    for number in range(config.vocab_size):
        names.append(name_of.get(number, f"[PAD{number}]"))
        if number not in name_of:
            types.append(gguf.TokenType.UNUSED)  # a row to spare
        elif number in added:
            types.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list(names)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)  # texts are trained without one

    layout = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    is_tied = model.lm_head.weight is model.transformer.wte.weight
    for name, weight in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue  # without it, llama.cpp takes the embedding
        weight = weight.T if name.endswith(TURNED) else weight
        place = layout.get_name(name, (".weight", ".bias"))
        assert place, f"GGUF has no name for {name}, though every GPT-2 has it"
        writer.add_tensor(place, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refuse_what_differs(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """See that llama.cpp computes a model, and makes tokens, as transformers does.

    Raises:
        UserError: it would not; the first difference is named.
    """
    config = model.config
    if config.activation_function not in ACTIVATIONS:
        raise UserError(f"its activation_function is {config.activation_function}, and llama.cpp's is gelu_new")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise UserError("its attention is scaled in another way, or crosses to another model, which GGUF cannot tell")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = content["pre_tokenizer"] or {}
    if (
        content["normalizer"]
        or steps.get("type") != "ByteLevel"
        or steps["add_prefix_space"]
        or not steps.get("use_regex", True)
        or content["model"].get("ignore_merges")
    ):
        raise UserError("its tokenizer does not cut texts as GPT-2's does, and llama.cpp would make other tokens")
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"its added token {token['content']!r} takes the blanks beside it or stands for whole words, which GGUF"
                " cannot tell"
            )

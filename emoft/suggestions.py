"""What was probably meant: the flag of ours that goes by another name elsewhere, or the nearest spelling."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

NEAR = 0.8  # difflib's ratio for flags: a flag that has nothing to do with the word would mislead
NEAR_CHOICE = 0.6  # for one of a few choices

# Ours: what it is called in TrainingArguments, run_clm.py, run_generation.py, nanoGPT, litgpt, trl, llama.cpp and
# by people. Only what a script has is offered, so a word may stand in several lines: the first one that counts, counts.
WORDS = {
    "config": "cfg preset recipe yaml config_file config_path configuration",
    "resume_from_checkpoint": "resume resume_from checkpoint ckpt resume_checkpoint continue continue_from restart"
    " ckpt_path",
    "model_name_or_path": "m model model_name model_path model_dir model_id model_folder base_model pretrained"
    " pretrained_model pretrained_model_name_or_path init_from load_from load_model hf_model model_type checkpoint"
    " checkpoint_dir ckpt",
    "tokenizer_name": "tokenizer tokenizer_path tokenizer_dir tokenizer_name_or_path",
    "config_overrides": "model_config overrides",
    "config_overrides n_layer=4": "n_layer n_layers num_layers",
    "config_overrides n_head=4": "n_head n_heads num_heads",
    "config_overrides n_embd=256": "n_embd d_model hidden_size embedding_dim",
    "config_overrides resid_pdrop=0.1": "dropout",
    "vocab_size": "vocab vocabulary_size",
    "dataset_name": "dataset data_set dataset_id dataset_path dataset_name_or_path hf_dataset",
    "dataset_config_name": "dataset_config subset config_name",
    "split": "dataset_split eval_split test_split dataset_test_split",
    "train_file": "data train train_data train_path training_file training_data train_dataset data_file data_path"
    " data_dir input input_file csv csv_file file text_file train_csv",
    "validation_file": "eval_file val_file valid_file dev_file validation validation_data validation_path val_data"
    " valid_data eval_data eval_path val_path dev_data eval_dataset val_dataset val valid",
    "test_file": "data test test_data test_path test_dataset eval_file eval_data data_file data_path input input_file"
    " csv csv_file file validation_file val_file valid_file",
    "delimiter": "sep separator delim csv_delimiter",
    "column_names": "columns header names",
    "text_column": "text_col text_field text_column_name dataset_text_field message_column text_key",
    "label_column": "label label_col label_field label_column_name emotion_column labels_column label_key",
    "template": "prompt_template text_template prompt_format",
    "append_eos": "add_eos eos add_eos_token append_eos_token end_of_text",
    "max_new_tokens": "max_tokens n_predict num_tokens new_tokens tokens max_generated_tokens",
    "max_length": "length max_len seq_length seq_len block_size max_seq_length max_seq_len max_sequence_length"
    " sequence_length context_length context_size model_max_length n_ctx ctx_len cutoff_len",
    "drop_duplicates": "dedup deduplicate dedupe remove_duplicates unique",
    "max_train_samples": "train_samples num_train_samples n_train limit num_samples max_samples train_size",
    "max_eval_samples": "eval_samples num_eval_samples n_eval limit num_samples max_samples max_test_samples eval_iters"
    " max_val_samples max_predict_samples",
    "num_train_epochs": "epoch epochs num_epochs n_epochs nb_epochs max_epochs train_epochs number_of_epochs",
    "max_steps": "iters steps num_steps n_steps train_steps num_train_steps max_train_steps max_iters num_iterations"
    " iterations total_steps training_steps",
    "per_device_train_batch_size": "bs batch batch_size batchsize b train_batch_size micro_batch_size mini_batch_size"
    " train_bs device_batch_size per_gpu_train_batch_size global_batch_size total_batch_size",
    "batch_size": "bs batch batchsize b per_device_eval_batch_size eval_batch_size",
    "batch_sizes": "bs batch batch_size batchsize b train_batch_size per_device_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size eval_bs val_batch_size test_batch_size per_gpu_eval_batch_size bs"
    " batch batch_size batchsize b",
    "gradient_accumulation_steps": "grad_accum accum accumulate grad_accumulation accumulation_steps accum_steps"
    " gradient_accumulation gradient_accumulation_iters grad_accum_steps grad_acc_steps accumulate_grad_batches"
    " update_freq",
    "batching": "packing pack padding packed padded padding_free pad_to_max_length group_by_length group_texts",
    "learning_rate": "lr max_lr peak_lr base_lr rate learn_rate learningrate",
    "lr_scheduler_type": "scheduler schedule lr_scheduler lr_schedule scheduler_type decay_lr lr_decay lr_decay_style",
    "warmup_steps": "warmup warm_up warmup_iters lr_warmup_steps num_warmup_steps lr_warmup",
    "weight_decay": "wd decay l2",
    "adam_beta1": "beta1 b1 betas adam_betas",
    "adam_beta2": "beta2 b2",
    "adam_epsilon": "eps epsilon adam_eps",
    "label_contrast": "contrast contrastive contrast_weight",
    "contrast_labels": "num_contrast_labels negatives num_negatives",
    "max_grad_norm": "clip grad_clip clip_grad clip_norm grad_norm gradient_clip gradient_clipping grad_norm_clip"
    " clip_grad_norm max_norm gradient_clip_val",
    "seed": "random_seed random_state manual_seed data_seed rng_seed",
    "mixed_precision": "amp dtype precision torch_dtype data_type autocast use_amp",
    "mixed_precision fp16": "fp16 float16 half use_fp16 fp16_full_eval",
    "mixed_precision bf16": "bf16 bfloat16 use_bf16 bf16_full_eval",
    "mixed_precision no": "fp32 float32 full_precision no_amp",
    "torch_compile": "compile compile_model use_compile",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing checkpointing grad_checkpoint",
    "output_dir": "o out output out_dir save_dir save_path output_path output_folder output_directory save_to",
    "overwrite_output_dir": "force overwrite overwrite_output overwrite_dir overwrite_output_directory",
    "logging_steps": "logging log log_every log_steps log_interval logging_interval log_freq log_iter_interval"
    " logging_strategy print_every",
    "eval_steps": "eval_every eval_interval eval_freq eval_strategy evaluation_strategy evaluate_every val_every"
    " val_interval evaluation_steps validation_steps val_check_interval",
    "save_steps": "save save_every save_interval save_freq save_strategy checkpoint_every checkpoint_interval"
    " ckpt_every",
    "save_total_limit": "save_limit keep_checkpoints max_checkpoints keep_last keep_last_n total_limit",
    "load_best_model_at_end": "load_best load_best_model best_model keep_best save_best",
    "early_stopping_patience": "patience early_stopping early_stop",
    "log_gradients_every": "log_gradients gradients watch watch_gradients gradient_logging log_grads track_gradients",
    "sample_every": "sample samples generate_every sample_steps sample_interval sampling_steps generate",
    "on_nonfinite": "nan on_nan skip_nan detect_anomaly nonfinite",
    "num_threads": "threads omp_num_threads torch_num_threads nthreads n_threads cpu_threads",
    "strength": "guidance guidance_scale cfg cfg_scale steering_strength intensity degree",
    "push_to_hub": "hub_model_id push_to_hub_model_id upload hub_repo repo_id",
    "plan": "dry_run estimate simulate what_if",
    "use_cpu": "cpu no_cuda no_gpu cpu_only force_cpu",
    "parallel": "strategy distributed_strategy",
    "parallel fsdp": "fsdp use_fsdp sharded deepspeed",
    "parallel ddp": "ddp use_ddp",
    # Of generate.py and emoft.evaluate
    "prompt": "input prefix start starting_text seed_text context",
    "prompts_file": "file prompt_file prompts input_file prompts_path batch_file",
    "emotion": "label mood feeling class sentiment",
    "text": "message beginning",
    "interactive": "chat i repl conversation",
    "no_repeat_ngram_size": "no_repeat_ngram ngram ngram_size no_repeat",
    "do_sample": "sample sampling random",
    "do_sample false": "greedy",
    "temperature": "t temp",
    "top_k": "k topk",
    "top_p": "topp nucleus",
    "num_return_sequences": "n num_samples samples num_sequences num_return num_outputs count number",
    "json": "jsonl as_json output_format json_output",
    "generate": "samples num_samples n sample num_generate n_samples",
    "use_class_prior": "prior class_prior",
    # Of emoft.export and emoft.step
    "output": "o out output_file output_path outfile save_to save_path file html",
    "format": "f type to target export_format outtype",
    "overwrite_output": "force overwrite overwrite_file",
    # Of emoft.benchmark
    "compare": "comparison mode task what benchmark",
    "processes": "nproc_per_node num_processes world_size workers ranks",
    "turns": "repeats rounds repetitions trials",
    "steps": "max_steps iters num_steps n_steps iterations",
    "prompts": "prompt num_prompts n_prompts",
}

# Where the answer is no flag but a sentence. It is given by those scripts that have all flags in it.
NOTES = (
    (
        "device devices gpu cuda use_gpu use_cuda no_cpu accelerator map_location",
        "GPUs are used where there are any; --use_cpu stays on the CPU",
    ),
    (
        "warmup_ratio warmup_proportion warmup_fraction lr_warmup_ratio warmup_share",
        "give --warmup_steps a number below 1, such as 0.1, which is that share of all steps",
    ),
    (
        "do_train do_eval do_predict",
        "it always trains, and evaluates where --validation_file or --dataset_name brings texts for it",
    ),
    (
        "report_to wandb use_wandb wandb_log wandb_project tensorboard use_tensorboard logging_dir log_dir logdir"
        " logger_name run_name",
        "every --logging_steps steps TensorBoard's files in the folder runs of --output_dir get an entry",
    ),
    (
        "num_gpus n_gpu gpus ngpu nproc nproc_per_node num_processes world_size nodes num_nodes nnodes local_rank"
        " distributed backend launcher",
        "start it by torchrun, whose own flags stand before train.py; see --parallel",
    ),
    ("optim optimizer optimizer_type", "the optimizer is AdamW, with --learning_rate and --weight_decay"),
    ("repetition_penalty repeat_penalty", "--no_repeat_ngram_size keeps sequences of tokens from coming twice"),
    (
        "o out output output_file output_dir output_path save_to save_path",
        "it prints what it writes: put > FILE behind the command; many prompts are given by --prompts_file",
    ),
    ("num_beams beams beam_size beam", "texts are continued greedily, or with --do_sample at random"),
    ("config config_file yaml preset", "its flags are given on the command line"),
)

# What people call a choice.
CHOICES = {
    "no": "fp32 float32 32 full none off false",
    "bf16": "bfloat16 bf16-mixed bf16-true",
    "fp16": "float16 half 16 fp16-mixed 16-mixed",
    "constant": "none off fixed",
}


def one_of(choices: Sequence[str]) -> str:
    """Return choices as words: a, b or c."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def suggest(word: str, choices: Iterable[str], cutoff: float = NEAR_CHOICE) -> str:
    """Return ", did you mean X?" of the choice nearest to a word, or nothing where none is near."""
    found = nearest(word, choices, cutoff)
    return f", did you mean {found}?" if found else ""


def nearest(word: str, choices: Iterable[str], cutoff: float = NEAR_CHOICE) -> str | None:
    """Return the choice that a word was probably meant for, in whatever case, or None."""
    by_lower = {choice.lower(): choice for choice in choices}
    word = word.lower()
    names = [choice for lower, choice in by_lower.items() if word in CHOICES.get(lower, "").split()]
    starts = [choice for lower, choice in by_lower.items() if len(word) > 2 and lower.startswith(word)]
    starts += [choice for lower, choice in by_lower.items() if len(lower) > 2 and word.startswith(lower)]
    near = difflib.get_close_matches(word, by_lower, n=1, cutoff=cutoff)
    if word in by_lower or near:
        return by_lower[word if word in by_lower else near[0]]
    return next(iter([*names, *starts]), None)


def unknown_flag(
    word: str,
    script: str,
    names: Collection[str],
    booleans: Collection[str] = (),
    preferred: Collection[str] = (),
    otherwise: str = "see --help",
) -> str:
    """Return what to say of a flag that a script does not have.

    Args:
        word: as it was typed, without its value.
        script: the name of the script.
        names: the flags that it has.
        booleans: those among them that are on or off.
        preferred: those among them that go first where a word can mean several.
        otherwise: what to say where nothing comes near.
    """
    name = re.sub(r"[-.]", "_", word.lstrip("-").lower())
    last = word.lower().rpartition(".")[2].lstrip("-").replace("-", "_")  # of litgpt's --train.max_steps
    if name.startswith("no_") and name[3:] in booleans:
        return f"unknown flag {word}, did you mean --{name[3:]} false?"
    known = _words_for(names) | _words_for(preferred) | {each: each for each in names}
    for each in dict.fromkeys((name, last)):
        if each in known:
            return f"unknown flag {word}, did you mean --{known[each]}?"
        for words, note in NOTES:
            if each in words.split() and set(re.findall(r"--(\w+)", note)) <= set(names):
                return f"{script} has no {word}: {note}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    near += [each for each in known if sorted(each) == sorted(name)]  # letters that changed places
    if near:
        return f"unknown flag {word}, did you mean --{known[near[0]]}?"
    # A part of one name alone, such as accumulation_steps.
    parts = set(name.split("_"))
    holders = [each for each in names if parts <= set(each.split("_"))]
    return f"unknown flag {word}, " + (f"did you mean --{holders[0]}?" if len(holders) == 1 else otherwise)


def _words_for(names: Collection[str]) -> dict[str, str]:
    """Return by the words of others the flags among these; of a word for several, the first."""
    return {word: ours for ours, words in reversed(WORDS.items()) if ours.split()[0] in names for word in words.split()}

"""What TensorBoard shows: the tags and what they mean, the diagnosis under Custom Scalars, the heat map, the guide."""

from emoft.gradients.thresholds import (
    ATTENTION_ENTROPY,
    ATTENTION_LOGIT,
    BATCH_ABOVE_NOISE,
    CLIPPED_NORM,
    CLIPPED_SHARE,
    CUT_SHARE,
    DEPTH_RATIO,
    DISTANCE,
    DISTINCT_SHARE,
    DIVERGED,
    EPOCHS,
    EVALUATION_RISE,
    FIRST_LOSS,
    KURTOSIS_SHARE,
    LEAST_ALIGNED,
    OVERLAP,
    SATURATION,
    UPDATE_TOO_LARGE,
    UPDATE_TOO_SMALL,
    WEIGHT_GROWTH,
)

# Where each figure of a log entry stands, and what TensorBoard says of it.
TAGS = {
    "loss": ("train/loss", "Mean cross-entropy of the target tokens since the last entry, in nats."),
    "perplexity": ("train/perplexity", "exp(train/loss): among how many tokens the model is undecided."),
    "unigram_entropy": (
        "train/unigram_entropy",
        "Loss of a model that knows how frequent each token is and nothing else, in nats. A constant, to compare with.",
    ),
    "uniform_loss": (
        "train/uniform_loss",
        "ln V: loss of a model for which all V tokens are equally likely, in nats. A constant, to compare with.",
    ),
    "label_alignment": (
        "train/label_alignment",
        "Share of targets that are the token right after the place that predicts them: 1 if labels are shifted once.",
    ),
    "grad_norm": ("train/grad_norm", "L2 norm of the whole gradient, unscaled, before clipping."),
    "max_grad_norm": ("train/max_grad_norm", "The norm that gradients are clipped to. A constant, to compare with."),
    "clipped_share": ("train/clipped_share", "Share of the steps since the last entry whose gradient was clipped."),
    "label_contrast": (
        "train/label_contrast",
        "Nats with which a text's label is told from wrong ones (--label_contrast); guessing among four costs 1.39.",
    ),
    "learning_rate": ("train/learning_rate", "AdamW's learning rate in this step."),
    "loss_scale": ("train/loss_scale", "fp16 only: what the loss is multiplied by before backward."),
    "skipped_steps": ("train/skipped_steps", "fp16 only: steps so far that changed nothing because of an overflow."),
    "distinct_texts": ("data/distinct_texts", "Share of train's examples that are not a repetition, token by token."),
    "cut_texts": ("data/cut_texts", "Share of train's texts that are longer than --max_length."),
    "emotions": ("data/emotions", "Emotions that train holds."),
    "emotion_by_words": (
        "data/emotion_by_words",
        "Share of train's texts whose emotion naive Bayes tells, which has seen others of them. No training is needed.",
    ),
    "largest_emotion": ("data/largest_emotion", "Share of these texts that have the most frequent emotion."),
    "emotions_asked": ("data/emotions_asked", "Number of these texts."),
    "train_checksum": ("data/train_checksum", "24 bits that tell the tokens of train from others."),
    "validation_checksum": ("data/validation_checksum", "Likewise, of the validation split."),
    "examples_per_step": ("train/examples_per_step", "Examples of an optimization step, over all ranks."),
    "dropout": ("model/dropout", "The highest dropout probability in the model."),
    "width": ("model/width", "Numbers in a token's vector (n_embd)."),
    "positions": ("model/positions", "Positions that the model knows (n_positions)."),
    "nonfinite_steps": ("train/nonfinite_steps", "Steps so far whose loss or gradient was infinite or NaN."),
    "spikes": ("train/spikes", "Steps so far whose loss stood far above those before: see spike-STEP.json."),
    "epoch": ("train/epoch", "Passes over the train split."),
    "samples_per_second": ("speed/samples_per_second", "Examples a second, without evaluation, saving and sampling."),
    "tokens_per_second": ("speed/tokens_per_second", "Target tokens a second, likewise."),
    "share_of_peak": ("speed/share_of_peak", "Operations the mathematics needs, of what the device does at best."),
    "memory_gib": ("speed/memory_gib", "Memory in GiB: of the process, or the most allocated on the GPU."),
    "eval_loss": ("eval/loss", "Mean cross-entropy of the validation split's target tokens, in nats."),
    "eval_perplexity": ("eval/perplexity", "exp(eval/loss)."),
    "eval_bits_per_byte": (
        "eval/bits_per_byte",
        "Cross-entropy of the validation split's targets, in bits, by the bytes they stand for: comparable between"
        " tokenizers.",
    ),
    "eval_emotion_accuracy": (
        "eval/emotion_accuracy",
        "Share of the validation split's texts whose emotion is the one under which the model finds them likeliest.",
    ),
    "eval_macro_f1": ("eval/macro_f1", "Mean over emotions of the F1 score of the same predictions."),
    "eval_largest_emotion": (
        "eval/largest_emotion",
        "Share of those texts that have the most frequent emotion: the accuracy of always saying that.",
    ),
    "eval_classified": ("eval/classified", "Number of those texts."),
    "eval_overlap_share": ("eval/overlap", "Share of the validation split's texts that train holds too, or nearly so."),
    "eval_loss_without_overlap": ("eval/loss_without_overlap", "eval/loss of the texts that train does not hold too."),
}
GROUPS = {
    "gradient_norm": "L2 norm of the step's whole gradient, unscaled, before clipping. h00 is the first block.",
    "weight_norm": "L2 norm of the weights, before the update.",
    "update_ratio": "log10 of |change of the weights in this step| / |weights|; -12 if nothing changed.",
    "gradient_zeros": "Share of the gradient's entries that are exactly zero.",
    "gradient_not_finite": "Entries of the gradient that are infinite or NaN.",
    "signal_to_noise": "|m| / |g - m| of the gradient g and AdamW's running mean m of those before it."
    " 0.23 if gradients are independent of each other.",
    "activation_norm": "L2 norm of a token's vector at the block's output, root mean square over a micro-batch.",
    "activation_gradient": "L2 norm of the loss's gradient there, over the micro-batch, unscaled.",
    "activation_saturation": "Share of the MLP's inputs to GELU below -3, where almost no gradient passes.",
    "attention_logit": "Largest score of attention, before softmax, over the texts and heads of a micro-batch.",
    "attention_entropy": "Mean entropy of attention, as a share of ln of the tokens that may be seen: 1 looks at all of"
    " them alike, 0 at a single one.",
    "kurtosis": "Mean fourth power of the numbers at the block's output by the square of their mean square: 3 for a"
    " normal distribution, n_embd where a single one holds everything.",
    "distance": "|weights - weights as the run began| / |weights as the run began|, estimated from 4,096 of a block.",
    "gradient_noise": "scatter: variance of the texts' gradients, summed over all weights; common: squared norm of what"
    " they have in common, which noise can make negative. scatter / common is a batch size (McCandlish et al., 2018).",
    "weights_at_start": "L2 norm of the layers of a kind as the run began. The horizontal axis is the block.",
    "final": "A figure of the finished run, for the HParams table.",
}
GUIDE_LEVEL = -3.0  # log10 of a healthy update ratio

# Pictures of all blocks, each line in the color of its depth, which TensorBoard's own charts cannot show: the title,
# and whether it is of logarithms.
DEPTH_CHARTS = {
    "gradient_norm": ("log10 of the gradient norm by block", True),
    "update_ratio": ("log10 of the update ratio by block", False),
    "activation_norm": ("log10 of the activation norm by block", True),
}
LAYOUT = {
    "1. Does it learn?": {
        "loss: train, eval, word frequencies, ln V": [
            "Multiline",
            ["^train/loss$", "^eval/loss$", "^train/unigram_entropy$", "^train/uniform_loss$"],
        ],
        "emotion accuracy, and of always one": ["Multiline", ["^eval/emotion_accuracy$", "^eval/largest_emotion$"]],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
        "targets that are the next token": ["Multiline", ["^train/label_alignment$"]],
    },
    "2. Do gradients reach every block?": {
        "gradient norm by depth": ["Multiline", [r"^gradient_norm/h\d+$"]],
        "gradient at each block's output": ["Multiline", [r"^activation_gradient/h\d+$"]],
        "activation at each block's output": ["Multiline", [r"^activation_norm/h\d+$"]],
        "share of dead MLP units": ["Multiline", [r"^activation_saturation/h\d+$"]],
        "largest score of attention": ["Multiline", [r"^attention_logit/h\d+$"]],
        "entropy of attention": ["Multiline", [r"^attention_entropy/h\d+$"]],
        "kurtosis of activations": ["Multiline", [r"^kurtosis/h\d+$"]],
    },
    "3. Are the steps of the right size?": {
        "update ratio (log10), guide at -3": ["Multiline", [r"^update_ratio/(h\d+|guide)$"]],
        "gradient norm before clipping": ["Multiline", ["^train/grad_norm$", "^train/max_grad_norm$"]],
        "share of steps clipped": ["Multiline", ["^train/clipped_share$"]],
        "weight norm": ["Multiline", [r"^weight_norm/h\d+$"]],
        "distance from the start": ["Multiline", [r"^distance/h\d+$"]],
        "signal to noise of gradients": ["Multiline", [r"^signal_to_noise/h\d+$"]],
        "gradient noise": ["Multiline", ["^gradient_noise/(scatter|common)$"]],
        "steps not finite, skipped, spikes": ["Multiline", ["^train/(nonfinite_steps|skipped_steps|spikes)$"]],
    },
    "4. How fast is it?": {
        "tokens per second": ["Multiline", ["^speed/tokens_per_second$"]],
        "share of the device's peak": ["Multiline", ["^speed/share_of_peak$"]],
        "memory (GiB)": ["Multiline", ["^speed/memory_gib$"]],
    },
}

# A line for each chart, so that all of it is seen at once: TensorBoard shows 27 lines of 108 characters of a text.
GUIDE_LINES = (
    ("chart", "healthy", "if not"),
    ("train/loss, eval/loss", "fall below unigram_entropy", "no fall: --learning_rate, --template, labels"),
    ("  the first", f"below {FIRST_LOSS} ln V (uniform_loss)", "weights too large, or of another tokenizer"),
    ("  later", f"never {DIVERGED} times its lowest", "diverges: --learning_rate, --warmup_steps"),
    ("  eval/loss", f"within {EVALUATION_RISE:.0%} of its lowest", "learned by heart: fewer epochs"),
    ("eval/emotion_accuracy", f"above largest_emotion, {EPOCHS} epochs", "--label_contrast 0.2; see IMAGES: confusion"),
    ("train/label_alignment", f"1 (above {LEAST_ALIGNED})", "labels shifted by none, or twice"),
    ("data/distinct_texts, overlap", f"above {DISTINCT_SHARE}; below {OVERLAP}", "repeated texts: --drop_duplicates"),
    ("data/cut_texts", f"at most {CUT_SHARE}", "texts lose their ends: --max_length"),
    ("gradient_norm/hNN", f"first and last within {DEPTH_RATIO:.0f} times", "vanishing or exploding: --warmup_steps"),
    ("IMAGES: by_depth, by_block", "colors change slowly", "gap: no gradient; bright column: bad batch"),
    ("activation_saturation/hNN", f"below {SATURATION}", "dead units: a smaller --learning_rate"),
    (
        "attention_logit, _entropy",
        f"below {ATTENTION_LOGIT:.0f}, or above {ATTENTION_ENTROPY}",
        "single tokens seen: c_attn starts too large",
    ),
    ("kurtosis/hNN", f"below {KURTOSIS_SHARE} n_embd", "one number holds all: --learning_rate"),
    (
        "update_ratio/hNN (log10)",
        f"{UPDATE_TOO_SMALL:g} to {UPDATE_TOO_LARGE:g}, near -3",
        "--learning_rate; -12: frozen",
    ),
    ("weight_norm/hNN", f"below {WEIGHT_GROWTH} times its first", "steps too large; shrinks: --weight_decay"),
    ("distance/hNN", f"fine-tuning: below {DISTANCE:g}", "pretraining is lost: --learning_rate"),
    (
        "train/grad_norm, clipped",
        f"below {CLIPPED_NORM:g} times the limit",
        f"if {CLIPPED_SHARE:.0%} are clipped: --max_grad_norm",
    ),
    ("signal_to_noise/hNN", "below 3", "steps smaller than they could be"),
    ("gradient_noise/*", f"batch below {BATCH_ABOVE_NOISE:.0f} scatter/common", "texts say the same: a smaller batch"),
    ("gradient_zeros/hNN", "near 0", "fp16 loses values: --mixed_precision bf16"),
    ("nonfinite_steps, spikes", "0", "see faults; --on_nonfinite, --on_spike skip"),
)
GUIDE = "\n".join(
    [
        "CUSTOM SCALARS asks four questions in order; `python -m emoft.gradients RUN_DIR` answers them in words.",
        *(f"{chart:30}{healthy:34}{cure}" for chart, healthy, cure in GUIDE_LINES),
        "A curve shows 1,000 points at most; all with --samples_per_plugin scalars=1000000.",
    ]
)

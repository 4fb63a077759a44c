"""What TensorBoard shows: the tags and what they mean, the diagnosis under Custom Scalars, the heat map, the guide."""

from emoft.gradients.thresholds import (
    CLIPPED_NORM,
    CLIPPED_SHARE,
    DEPTH_RATIO,
    DISTINCT_SHARE,
    DIVERGED,
    EPOCHS,
    EVALUATION_RISE,
    FIRST_LOSS,
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
    "emotions": ("data/emotions", "Emotions that train holds."),
    "emotion_by_words": (
        "data/emotion_by_words",
        "Share of train's texts whose emotion naive Bayes tells, which has seen others of them. No training is needed.",
    ),
    "largest_emotion": ("data/largest_emotion", "Share of these texts that have the most frequent emotion."),
    "emotions_asked": ("data/emotions_asked", "Number of these texts."),
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
    "eval_overlap": ("eval/overlap", "Share of the validation split's texts that train holds too, or nearly so."),
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
    "final": "A figure of the finished run, for the HParams table.",
}
GUIDE_LEVEL = -3.0  # log10 of a healthy update ratio

LAYOUT = {
    "1. Does it learn?": {
        "loss: train, evaluation, and that of word frequencies alone": [
            "Multiline",
            ["^train/loss$", "^eval/loss$", "^train/unigram_entropy$"],
        ],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
    },
    "2. Do gradients reach every block?": {
        "gradient norm by depth": ["Multiline", [r"^gradient_norm/h\d+$"]],
        "gradient at the output of each block": ["Multiline", [r"^activation_gradient/h\d+$"]],
        "activations at the output of each block": ["Multiline", [r"^activation_norm/h\d+$"]],
    },
    "3. Are the steps of the right size?": {
        "update ratio by depth (log10), guide at -3": ["Multiline", [r"^update_ratio/(h\d+|guide)$"]],
        "gradient norm before clipping": ["Multiline", ["^train/grad_norm$", "^train/max_grad_norm$"]],
        "share of steps clipped": ["Multiline", ["^train/clipped_share$"]],
        "targets that are the next token (must be 1)": ["Multiline", ["^train/label_alignment$"]],
        "steps that were not finite or skipped": ["Multiline", ["^train/(nonfinite_steps|skipped_steps|spikes)$"]],
    },
    "4. How fast is it?": {
        "tokens per second": ["Multiline", ["^speed/tokens_per_second$"]],
        "share of the device's peak": ["Multiline", ["^speed/share_of_peak$"]],
        "memory (GiB)": ["Multiline", ["^speed/memory_gib$"]],
    },
}

GUIDE = f"""
Open **Custom Scalars** first: its four groups ask four questions in this order. `python -m emoft.gradients RUN_DIR`
reads the same figures, by the same thresholds, and says in words what is wrong and what follows from what.

| chart | healthy | if not | change |
| --- | --- | --- | --- |
| `train/loss`, `eval/loss` | both fall, and end well below `train/unigram_entropy`; the first is at most \
{FIRST_LOSS} times `train/uniform_loss` | no fall: labels or learning rate | `--learning_rate`, `--template` |
| | | `eval/loss` rises more than {EVALUATION_RISE:.0%} while `train/loss` falls: it learns the texts by heart | fewer \
epochs, `--early_stopping_patience` |
| | | rises above {DIVERGED} times its lowest: it diverges | `--learning_rate`, `--warmup_steps` |
| `eval/emotion_accuracy`, `IMAGES: confusion` | above `eval/largest_emotion` after {EPOCHS} epochs; a bright diagonal \
| a row is bright elsewhere: that emotion is taken for another | more examples of it, `--label_contrast 0.2` |
| `train/label_alignment` | 1 | below {LEAST_ALIGNED}: labels are shifted by none, or twice | the code that shifts \
them |
| `data/distinct_texts`, `eval/overlap` | above {DISTINCT_SHARE}; below {OVERLAP} | texts are there again and again; \
the evaluation is on train's texts | the files, `--drop_duplicates` |
| `gradient_norm/hNN` | the first block within a factor of {DEPTH_RATIO:.0f} of the last | falls towards h00: \
vanishing; grows: exploding | `--warmup_steps`, a smaller `--learning_rate` |
| `IMAGES: gradient_norm_by_block` | colors change slowly from step to step | a row without color: a block that gets \
no gradient; a bright column: a bad batch | look at the texts of that step |
| `update_ratio/hNN` | between {UPDATE_TOO_SMALL:g} and {UPDATE_TOO_LARGE:g}: near -3 in fine-tuning, near -2 from \
random weights | above: too large; below: hardly moves; -12: frozen | `--learning_rate` |
| `weight_norm/hNN` | grows to less than {WEIGHT_GROWTH} times its first | grows more: the steps are too large; \
shrinks: weight decay | `--learning_rate`, `--weight_decay` |
| `train/clipped_share` | any, as long as `train/grad_norm` is below {CLIPPED_NORM:g} times the limit | above, at more \
than {CLIPPED_SHARE:.0%} of the steps: all steps are equally long | `--max_grad_norm`, `--learning_rate` |
| `train/nonfinite_steps` | 0 | see `nonfinite` on this page and nonfinite-STEP.json | what the report names |
| `signal_to_noise/*` | below 3 | above 3: steps are smaller than they could be | `--learning_rate` |
| `gradient_zeros/*` | near 0, but for `wpe` | grows: values vanish in fp16, or units are dead | \
`--mixed_precision bf16` |
| `activation_saturation/hNN` | below {SATURATION} | above: the MLP's units are dead | a smaller `--learning_rate` |
| `gradient_norm/wte.touched`, `.others` | touched above others | the head sends gradient to every row of the \
embedding, the texts only to those they hold | |

TensorBoard keeps 1,000 points of a curve; to see all, start it with `--samples_per_plugin scalars=1000000`.
"""

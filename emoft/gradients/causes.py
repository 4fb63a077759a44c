"""Which finding explains which: what is said first is a cause, what follows from it is marked as its consequence."""

from emoft.gradients.finding import Finding

# In the order in which causes are told, if there are several: what is wrong before the first step comes before what
# goes wrong on the way, and what is certain by itself before what may have many reasons.
ORDER = (
    "labels_misaligned",
    "initialization_too_large",
    "initialization_too_small",
    "layer_scale",
    "first_loss_too_high",
    "gradient_cut",
    "frozen",
    "weights_decay",
    "schedule_not_followed",
    "learning_rate_jumps",
    "no_warmup",
    "learning_rate_too_high",
    "pretraining_lost",
    "not_finite",
    "learning_rate_too_low",
    "dropout_too_strong",
    "dead_units",
    "attention_stuck",
    "outlier_features",
    "skipped_too_often",
    "texts_repeated",
    "texts_cut",
    "one_emotion",
    "labels_do_not_fit",
    "evaluated_on_train",
    "exploding",
    "vanishing",
    "clipped_too_often",
    "loss_spikes",
    "batch_too_large",
    "loss_does_not_fall",
    "context_not_used",
    "emotions_not_learned",
    "overfitting",
)
LEARNS_BADLY = {"loss_does_not_fall", "context_not_used", "emotions_not_learned"}
UNSTEADY = {"clipped_too_often", "loss_spikes", "exploding", "vanishing", "dead_units", "skipped_too_often"}
UNSTEADY |= {"attention_stuck", "outlier_features", "pretraining_lost"}
RUNS_AWAY = {"learning_rate_too_high", "learning_rate_jumps", "no_warmup", "first_loss_too_high", "not_finite"}
BAD_START = LEARNS_BADLY | UNSTEADY | RUNS_AWAY | {"layer_scale", "learning_rate_too_low", "overfitting"}
BAD_START |= {"batch_too_large"}
# By each cause, the findings that need no other explanation where it is found.
EXPLAINS: dict[str, set[str]] = {
    "labels_misaligned": LEARNS_BADLY | UNSTEADY | {"overfitting", "learning_rate_too_high", "batch_too_large"},
    "initialization_too_large": BAD_START,
    "initialization_too_small": BAD_START,
    "layer_scale": BAD_START,
    "first_loss_too_high": BAD_START,
    "gradient_cut": LEARNS_BADLY | {"frozen", "vanishing"},
    "frozen": LEARNS_BADLY | {"vanishing"},
    "weights_decay": LEARNS_BADLY | UNSTEADY | RUNS_AWAY,
    "schedule_not_followed": LEARNS_BADLY | UNSTEADY | RUNS_AWAY | {"learning_rate_too_low"},
    "learning_rate_jumps": LEARNS_BADLY | UNSTEADY | RUNS_AWAY | {"learning_rate_too_low"},
    "no_warmup": LEARNS_BADLY | UNSTEADY | RUNS_AWAY,
    "learning_rate_too_high": LEARNS_BADLY | UNSTEADY | RUNS_AWAY | {"overfitting"},
    "not_finite": LEARNS_BADLY | UNSTEADY,
    "pretraining_lost": LEARNS_BADLY | UNSTEADY | {"overfitting"},
    "learning_rate_too_low": LEARNS_BADLY | {"vanishing"},
    "dropout_too_strong": LEARNS_BADLY,
    "dead_units": LEARNS_BADLY | {"vanishing"},
    "skipped_too_often": LEARNS_BADLY,
    "attention_stuck": LEARNS_BADLY | {"vanishing"},
    "texts_repeated": {"batch_too_large", "one_emotion", "overfitting", "emotions_not_learned"},
    "texts_cut": {"emotions_not_learned", "labels_do_not_fit", "overfitting", "batch_too_large"},
    "one_emotion": {"emotions_not_learned", "overfitting"},
    "labels_do_not_fit": {"emotions_not_learned"},
    "evaluated_on_train": {"overfitting"},
    "loss_does_not_fall": {"context_not_used", "emotions_not_learned"},
    "context_not_used": {"emotions_not_learned"},
}


def by_cause(findings: list[Finding]) -> tuple[list[Finding], dict[str, str]]:
    """Return findings with the causes first, and by the name of each consequence that of its cause."""
    ordered = sorted(findings, key=lambda finding: ORDER.index(finding.name))
    because: dict[str, str] = {}
    for finding in ordered:
        # A consequence explains nothing further: that chain leads to its own cause.
        if finding.name not in because:
            because |= {
                each.name: finding.name
                for each in ordered
                if each.name in EXPLAINS.get(finding.name, ())
                and each.name not in because
                and each.name != finding.name
            }
    causes = [finding for finding in ordered if finding.name not in because]
    return causes + [finding for finding in ordered if finding.name in because], because

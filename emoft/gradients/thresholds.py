"""Where healthy ends. The diagnosis, the guide in TensorBoard and the README say the same, since they all read it here.

Chosen by `python tests/faults.py --tuning`, on other seeds and sizes than those that emoft/docs/faults.md reports.
"""

# The loss.
ENTRIES = 10  # log entries below which nothing is said of how the loss goes
LEAST_ALIGNED = 0.99  # of the targets; two equal tokens in a row make a wrong shift right now and then
LEAST_FALL = 0.02  # of the loss over a run, as a share of it
ALREADY_GOOD = 0.9  # of the loss of word frequencies: a model that begins below it may have nothing left to learn
STILL_FALLING = 0.02  # of the loss over two fifths of the run, as a share of it: then it is too early to judge
DIVERGED = 1.25  # times the lowest loss before
EVALUATION_RISE = 0.02  # of the evaluation loss above its lowest, as a share of it
SPIKE_WINDOW = 15  # log entries before one that tell whether it stands out
SPIKE_DEVIATIONS = 6.0  # standard deviations, estimated from the median absolute deviation
SPIKE_RISE = 0.12  # and at least so much above the median, as a share of it

# The model as it starts.
DROPOUT = 0.5  # GPT-2 has 0.1
FIRST_LOSS = 1.3  # times ln V, which is the loss of knowing nothing
LARGEST_WEIGHTS = 0.3  # root mean square of a matrix; GPT-2 starts at 0.02 and ends near 0.13
SMALLEST_WEIGHTS = 0.004
LAYER_RATIO = 10.0  # between the weight norms of a layer and of the same layer in other blocks

# The gradient on its way.
DEPTH_RATIO = 100.0  # between the gradient norms of the first block and the last
SATURATION = 0.9  # of an MLP's units whose GELU is all but shut

ATTENTION_LOGIT = 400.0  # a score of attention far beyond where softmax passes any gradient; the demo comes to 170
ATTENTION_ENTROPY = 0.02  # of what is possible, below which attention looks at single tokens; both must be so
KURTOSIS_SHARE = 0.6  # of n_embd, which it is where a single number holds a whole activation
KURTOSIS_RISE = 5.0  # times the first measurement: a pretrained model comes with numbers that stand out

# The batch.
NOISE_MEASUREMENTS = 5  # of gradient noise, below which nothing is said
BATCH_ABOVE_NOISE = 30.0  # times the noise scale: all its texts say the same

# The steps.
UPDATE_TOO_SMALL, UPDATE_TOO_LARGE = (
    -5.0,
    -1.0,
)  # log10; guide is -3, and small models from random weights learn at -1.5
UPDATE_JUMP = 1.2  # of log10, between two measurements, beyond what the schedule explains
WEIGHT_GROWTH = 2.5  # times the norm at the start
ACTIVATION_GROWTH = 100.0  # times the norm at the first measurement
DISTANCE = 1.0  # of pretrained weights from where they began, as a share of their norm
WEIGHT_DECAY = 0.002  # of a weight in a step: --learning_rate times --weight_decay
USUAL_DECAY = 0.1  # --weight_decay; the smaller one is no cause, whatever the learning rate makes of it
WEIGHT_LOSS = 0.7  # of the norm at the start, below which weights have decayed
SCHEDULE_ERROR = 0.05  # of the highest learning rate
CLIPPED_SHARE = 0.9
CLIPPED_NORM = 3.0  # times --max_grad_norm; AdamW evens out a milder clipping
SKIPPED_SHARE = 0.05  # of steps, by fp16's loss scaling

# The data.
DISTINCT_SHARE = 0.5  # of train's texts
CUT_SHARE = 0.5  # of train's texts
OVERLAP = 0.5  # of the validation texts that train holds too
EPOCHS = 3  # before which nothing is said of how well the model tells emotions
CLASSIFIED = 60  # texts below which nothing is said of how well emotions are told

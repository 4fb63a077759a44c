"""Every figure of a measured step against an independent computation in float64."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import count_hooks, read_scalars
from safetensors.torch import load_file
from test_train import flags
from torch.amp import GradScaler
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.config import TrainConfig
from emoft.data.batching import Batch, pack, pad
from emoft.data.steps import Step
from emoft.distributed.world import World
from emoft.gradients.listener import Listener
from emoft.gradients.monitor import BINS, Figures, GradientMonitor, Histogram, group_parameters, histogram
from emoft.gradients.names import KINDS, NO_UPDATE
from emoft.model.attention import use_packed_attention
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.optimizer import build_optimizer, clip_in_next_step

TEXTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 1, 1, 2, 3, 4, 5, 6], [3], [2, 11, 12], [5, 4, 3, 2, 1, 0]]
SETTINGS = TrainConfig(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.7, log_gradients_every=2, log_gradients_of="layers"
)


def model_of(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape = GPT2Config(
        n_layer=3,
        n_embd=16,
        n_head=2,
        n_positions=16,
        vocab_size=20,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(shape).double().train()


def measured_step(batches: list[Batch], scale: float) -> tuple[Figures, GPT2LMHeadModel]:
    """Two steps of the loop's own parts, the second measured; and the model after it."""
    model = model_of()
    use_packed_attention(model)
    optimizer = build_optimizer(model, SETTINGS)
    monitor = GradientMonitor(model, optimizer, SETTINGS, World())
    scaler = GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    lengths = np.array([length for batch in batches for length in batch.lengths])
    figures = None
    for number in (1, 2):
        step = Step(number, list(range(len(lengths))), lengths, batches, loss_scale=scaler.get_scale())
        with monitor.watching(step):
            for batch in batches:
                hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
                targets = shift_labels(batch.labels)
                loss = cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting).sum() / step.tokens
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_in_next_step(optimizer, SETTINGS.max_grad_norm)
            monitor.measure_gradients()
            scaler.step(optimizer)
            scaler.update()
        figures = monitor.take_figures()
        assert (figures is not None) == (number == 2)
        assert monitor.take_figures() is None, "taken once"
        assert count_hooks(model) == 0
        optimizer.zero_grad()
    return figures, model


def loss_of(logits: torch.Tensor, text: list[int]) -> torch.Tensor:
    """The library's own loss, but summed, and not rounded to float32 as there."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(text[1:]), reduction="sum")


class ByHand:
    """The same two steps, text by text, by the library's own model, clipping and AdamW."""

    def __init__(self) -> None:
        self.model = model_of()
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, foreach=False
        )
        texts = [text for text in TEXTS if len(text) > 1]
        tokens = sum(len(text) - 1 for text in texts)
        for step in (1, 2):
            optimizer.zero_grad()
            for text in texts:
                (loss_of(self.model(input_ids=torch.tensor([text])).logits, text) / tokens).backward()
            self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            if step == 2:
                self.means = {
                    name: optimizer.state[p]["exp_avg"] / (1 - 0.9) for name, p in self.model.named_parameters()
                }
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.7)
            self.clipped = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            optimizer.step()
        self.after = {name: p.detach() for name, p in self.model.named_parameters()}

    def names(self, place: str) -> list[str]:
        if place in ("wte", "wpe", "ln_f"):
            return [name for name in self.before if name.startswith(f"transformer.{place}.")]
        block, _, kind = place.partition(".")
        return [name for name in self.before if name.startswith(f"transformer.h.{int(block[1:])}.{kind}")]

    def entries(self, values: dict[str, torch.Tensor], place: str) -> np.ndarray:
        return np.concatenate([values[name].numpy().ravel() for name in self.names(place)])


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    return ByHand()


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_figures_are_those_of_the_whole_step(by_hand: ByHand, collate, parts: int, scale: float) -> None:
    size = len(TEXTS) // parts
    rows = [[{"input_ids": text} for text in TEXTS[start : start + size]] for start in range(0, len(TEXTS), size)]
    figures, model = measured_step(
        [collate(each, pad_id=0, multiple=4 if collate is pack else 1) for each in rows], scale
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand.after[name], rtol=1e-6, atol=1e-9)

    def same(tag: str, expected: float) -> None:
        assert figures.scalars[tag] == pytest.approx(expected, rel=1e-6, abs=1e-12), tag

    places = [f"h{block:02}.{kind}" for block in range(3) for kind in KINDS] + [
        "h00",
        "h01",
        "h02",
        "wte",
        "wpe",
        "ln_f",
    ]
    change = {name: by_hand.after[name] - weight for name, weight in by_hand.before.items()}
    noise = {name: by_hand.clipped[name] - mean for name, mean in by_hand.means.items()}
    for place in places:
        norm = {
            name: np.linalg.norm(by_hand.entries(values, place))
            for name, values in (
                ("gradient", by_hand.gradients),
                ("weight", by_hand.before),
                ("change", change),
                ("mean", by_hand.means),
                ("noise", noise),
            )
        }
        same(f"gradient_norm/{place}", norm["gradient"])
        same(f"weight_norm/{place}", norm["weight"])
        same(f"update_ratio/{place}", math.log10(norm["change"] / norm["weight"]))
        if place[1:].isdigit():
            continue
        if "c_attn" not in place:  # the gradient of the keys' bias is rounding, which may be zero or not
            same(f"gradient_zeros/{place}", float((by_hand.entries(by_hand.gradients, place) == 0).mean()))
        same(f"signal_to_noise/{place}", norm["mean"] / norm["noise"])
    assert figures.depth == [figures.scalars[f"gradient_norm/h{block:02}"] for block in range(3)]

    touched = sorted({token for text in TEXTS for token in text})
    others = [token for token in range(20) if token not in touched]
    rows_of = by_hand.gradients["transformer.wte.weight"]
    same("gradient_norm/wte.touched", rows_of[touched].norm().item())
    same("gradient_norm/wte.others", rows_of[others].norm().item())
    assert figures.scalars["gradient_norm/wte.others"] > 0, "the head sends gradient to all rows"

    for kind, values in (("gradients", by_hand.gradients), ("weights", by_hand.before)):
        for place in ("h00", "h01", "h02", "wte"):
            entries, ours = by_hand.entries(values, place), figures.histograms[f"{kind}/{place}"]
            counts, edges = np.histogram(entries, BINS, (entries.min(), entries.max()))
            assert sum(ours.counts) == len(entries)
            # An entry on the edge of two bins may fall into either.
            assert np.abs(np.cumsum(ours.counts) - np.cumsum(counts)).max() <= 1
            np.testing.assert_allclose(ours.limits, edges[1:], rtol=1e-6, atol=1e-9)
            assert ours.total == pytest.approx(entries.sum(), rel=1e-6, abs=1e-9)
            assert ours.squares == pytest.approx((entries**2).sum(), rel=1e-6)


def test_activations_are_those_of_the_first_micro_batch() -> None:
    """Against the library's hidden states of each text, and their gradients."""
    first, second = TEXTS[:3], TEXTS[3:]
    batches = [pack([{"input_ids": text} for text in part], pad_id=0, multiple=8) for part in (first, second)]
    figures, _ = measured_step(batches, scale=64.0)
    model = model_before_second_step()
    tokens = sum(len(text) - 1 for text in TEXTS)
    outputs, gradients, inputs = [[], [], []], [[], [], []], [[], [], []]
    for number, block in enumerate(model.transformer.h):
        block.mlp.act.register_forward_pre_hook(lambda _, args, number=number: inputs[number].append(args[0].detach()))
    for text in first:
        result = model(input_ids=torch.tensor([text]), output_hidden_states=True)
        hidden = list(result.hidden_states[1:-1])  # the last one has gone through ln_f
        for number, each in enumerate(torch.autograd.grad(loss_of(result.logits, text) / tokens, hidden)):
            outputs[number].append(hidden[number].detach()[0])
            gradients[number].append(each[0])
    for number in range(2):
        states, flow = torch.cat(outputs[number]), torch.cat(gradients[number])
        name = f"h{number:02}"
        assert figures.scalars[f"activation_norm/{name}"] == pytest.approx(
            states.norm(dim=1).square().mean().sqrt().item()
        )
        assert figures.scalars[f"activation_gradient/{name}"] == pytest.approx(flow.norm().item())
    for number in range(3):
        saturated = torch.cat([each[0] for each in inputs[number]]) < -3
        assert figures.scalars[f"activation_saturation/h{number:02}"] == pytest.approx(saturated.double().mean().item())


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize(("parts", "scale"), [(1, 1.0), (3, 64.0)])
def test_what_a_block_shows_of_itself(by_hand: ByHand, collate, parts: int, scale: float) -> None:
    """Attention's scores, fourth powers and the scatter of the texts' gradients, each text by itself."""
    size = len(TEXTS) // parts
    rows = [[{"input_ids": text} for text in TEXTS[start : start + size]] for start in range(0, len(TEXTS), size)]
    figures, _ = measured_step([collate(each, pad_id=0) for each in rows], scale)
    model = model_before_second_step()
    model.set_attn_implementation("eager")
    scores: list[list[torch.Tensor]] = [[], [], []]
    states: list[list[torch.Tensor]] = [[], [], []]
    for text in TEXTS[:size]:
        result = model(input_ids=torch.tensor([text]), output_attentions=True, output_hidden_states=True)
        for number in range(3):
            scores[number].append(result.attentions[number][0].detach())  # (H, T, T) after softmax
        for number in range(2):
            states[number].append(result.hidden_states[number + 1][0].detach())
    for number, name in enumerate(("h00", "h01", "h02")):
        shares = []
        for chances in scores[number]:
            for place in range(1, chances.shape[1]):
                row = chances[:, place, : place + 1]
                shares += (-(row * row.log()).sum(-1) / math.log(place + 1)).tolist()
        assert figures.scalars[f"attention_entropy/{name}"] == pytest.approx(np.mean(shares), rel=1e-5)
    for number in range(2):
        values = torch.cat(states[number])
        kurtosis = (values**4).mean() / (values**2).mean() ** 2
        assert figures.scalars[f"kurtosis/h{number:02}"] == pytest.approx(kurtosis.item(), rel=1e-5)


def test_the_largest_score_of_attention(by_hand: ByHand) -> None:
    figures, _ = measured_step([pack([{"input_ids": text} for text in TEXTS], pad_id=0)], 1.0)
    model = model_before_second_step()
    attention, largest = model.transformer.h[1].attn, -math.inf

    def look(module, inputs, output) -> None:
        nonlocal largest
        query, key, _ = (part.view(-1, 2, 8).transpose(0, 1) for part in output[0].detach().split(16, dim=-1))
        scores = query @ key.transpose(1, 2) / 8**0.5
        largest = max(largest, scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).max().item())

    attention.c_attn.register_forward_hook(look)
    for text in TEXTS:
        model(input_ids=torch.tensor([text]))
    assert figures.scalars["attention_logit/h01"] == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize(("parts", "scale"), [(1, 1.0), (3, 64.0)])
def test_the_gradient_noise_is_that_of_the_texts_gradients(collate, parts: int, scale: float) -> None:
    """Each text's gradient of the blocks' matrices by a backward pass of its own."""
    size = len(TEXTS) // parts
    rows = [[{"input_ids": text} for text in TEXTS[start : start + size]] for start in range(0, len(TEXTS), size)]
    figures, _ = measured_step([collate(each, pad_id=0) for each in rows], scale)
    model = model_before_second_step()
    matrices = [p for name, p in model.named_parameters() if ".c_" in name and name.endswith("weight")]
    tokens = sum(len(text) - 1 for text in TEXTS)
    gradients = []
    for text in TEXTS:
        model.zero_grad()
        if len(text) > 1:
            (loss_of(model(input_ids=torch.tensor([text])).logits, text) / tokens).backward()
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in matrices]))
    alike = torch.stack(gradients) * len(TEXTS)  # what the gradient would be if all texts were like one
    scatter = alike.var(dim=0, unbiased=True).sum().item()
    assert figures.scalars["gradient_noise/scatter"] == pytest.approx(scatter, rel=1e-4)
    common = alike.mean(0).square().sum().item() - scatter / len(TEXTS)
    assert figures.scalars["gradient_noise/common"] == pytest.approx(common, rel=1e-3)


def test_the_distance_from_the_start() -> None:
    """All of a small block's weights are looked at, and the estimate is exact."""
    model = model_of()
    use_packed_attention(model)
    monitor = GradientMonitor(model, build_optimizer(model, SETTINGS), SETTINGS, World())
    monitor.weights_at_start()
    began = torch.cat([p.detach().flatten() for p in model.transformer.h[1].parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    now = torch.cat([p.detach().flatten() for p in model.transformer.h[1].parameters()])
    sample, start = monitor._sample("h01"), torch.tensor(monitor.start["h01"])
    assert ((sample - start).norm() / start.norm()).item() == pytest.approx(
        ((now - began).norm() / began.norm()).item(), rel=1e-5
    )


def model_before_second_step() -> GPT2LMHeadModel:
    by_hand = ByHand()
    model = copy.deepcopy(by_hand.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(by_hand.before[name])
    return model


def test_every_parameter_belongs_to_one_group() -> None:
    model = model_of()
    groups = group_parameters(model)
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in model.parameters())
    assert set(groups) == {f"h{n:02}.{kind}" for n in range(3) for kind in KINDS} | {"wte", "wpe", "ln_f"}


def test_values_that_are_not_finite_are_counted_apart() -> None:
    values = torch.tensor([1.0, math.nan, -2.0, math.inf, -math.inf, 3.0, math.nan])
    ours = Histogram.read(histogram([values[:4], values[4:]]).tolist())
    assert (ours.low, ours.high, sum(ours.counts), ours.not_finite) == (-2.0, 3.0, 3, 4)
    assert (ours.total, ours.squares) == (2.0, pytest.approx(14.0))
    nothing = Histogram.read(histogram([torch.tensor([math.nan])]).tolist())
    assert (sum(nothing.counts), nothing.not_finite) == (0, 1)
    constant = Histogram.read(histogram([torch.zeros(5)]).tolist())
    assert sum(constant.counts) == 5
    assert constant.low < 0 < constant.high


def test_a_count_above_what_float32_holds() -> None:
    ours = Histogram.read(histogram([torch.zeros(2**24 + 2**20 + 1).index_fill_(0, torch.tensor([0]), 1.0)]).tolist())
    assert sum(ours.counts) == 2**24 + 2**20 + 1


def test_steps_that_are_not_measured_leave_no_hook() -> None:
    model = model_of()
    config = replace(SETTINGS, log_gradients_every=3)
    monitor = GradientMonitor(model, build_optimizer(model, config), config, World())
    batch = pack([{"input_ids": TEXTS[0]}], pad_id=0)
    hooks = {}
    for number in (1, 2, 3, 4):
        with monitor.watching(Step(number, [0], np.array(batch.lengths), [batch])):
            hooks[number] = count_hooks(model)
            # Refused here: its gradients are never measured.
        assert count_hooks(model) == 0
    assert hooks == {1: 0, 2: 0, 3: 1 + 3 * (3 + 4), 4: 0}, "of each of three blocks three, and one of each matrix"


class TestThroughTheScript:
    """--log_gradients_every in a run of train.py, its event file and its checkpoints."""

    STEPS = 4

    @pytest.fixture(scope="class")
    @classmethod
    def run_dir(cls, scripts, tmp_path_factory, tiny_model, train_file) -> Path:
        folder = tmp_path_factory.mktemp("measured")
        words = flags(
            tiny_model,
            train_file,
            max_steps=cls.STEPS,
            save_steps=1,
            save_total_limit=0,
            log_gradients_every=1,
            log_gradients_of="layers",
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            warmup_steps=2,
        )
        result = scripts("train.py", *words, cwd=folder)
        assert result.code == 0, result.err
        return folder / "run"

    def test_the_update_ratio_is_the_change_between_checkpoints(self, run_dir: Path, tiny_model: Path) -> None:
        curves = read_scalars(run_dir)
        weights = [load_file(tiny_model / "model.safetensors")]
        weights += [load_file(run_dir / f"checkpoint-{step}/model.safetensors") for step in range(1, self.STEPS + 1)]
        assert curves["update_ratio/h01.mlp.c_fc"][1] == NO_UPDATE, "warmup begins with a learning rate of 0"
        for step in range(2, self.STEPS + 1):
            names = [name for name in weights[0] if name.startswith("transformer.h.1.mlp.c_fc.")]
            before = torch.cat([weights[step - 1][name].flatten() for name in names]).double()
            after = torch.cat([weights[step][name].flatten() for name in names]).double()
            expected = ((after - before).norm() / before.norm()).log10().item()
            assert curves["update_ratio/h01.mlp.c_fc"][step] == pytest.approx(expected, abs=1e-5)

    def test_measuring_changes_nothing(self, run_dir: Path, scripts, tmp_path, tiny_model, train_file) -> None:
        words = flags(
            tiny_model,
            train_file,
            max_steps=self.STEPS,
            gradient_accumulation_steps=2,
            warmup_steps=2,
            per_device_train_batch_size=2,
        )
        assert scripts("train.py", *words, cwd=tmp_path).code == 0
        ours, plain = (load_file(folder / "model.safetensors") for folder in (run_dir, tmp_path / "run"))
        assert all(torch.equal(ours[name], plain[name]) for name in plain)
        assert not any(tag.startswith("update_ratio") for tag in read_scalars(tmp_path / "run"))

    def test_fewer_than_250_tags_for_twelve_blocks(self, scripts, tmp_path, train_file) -> None:
        words = flags(
            "",
            train_file,
            config_overrides="n_layer=12,n_embd=8,n_head=1,n_positions=64",
            vocab_size=300,
            max_steps=2,
            log_gradients_every=1,
            validation_file=train_file,
            template="{label}: {text}",
        )
        result = scripts("train.py", *words, cwd=tmp_path)
        assert result.code == 0, result.err
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        kinds = EventAccumulator(str(tmp_path / "run" / "runs")).Reload().Tags()
        assert 150 < len(kinds["scalars"]) < 250, len(kinds["scalars"])
        assert [tag for tag in kinds["scalars"] if tag.startswith("gradient_norm/h11")] == ["gradient_norm/h11"]
        assert len(kinds["histograms"]) == 2 * 13
        layers = scripts("train.py", *words, "--log_gradients_of=layers", "--output_dir=layers", cwd=tmp_path)
        assert layers.code == 0
        kinds = EventAccumulator(str(tmp_path / "layers" / "runs")).Reload().Tags()
        assert len([tag for tag in kinds["scalars"] if tag.startswith("gradient_norm/h11")]) == 6


def test_attention_is_looked_at_in_float32_whatever_autocast_does() -> None:
    """In fp16 the smallest probabilities are 0, and their logarithms are not finite."""
    batch = pack([{"input_ids": text} for text in TEXTS], pad_id=0, multiple=8)
    model = model_before_second_step()
    listener = Listener(model, ["h00", "h01", "h02"], [batch], 1.0)
    with torch.autocast("cpu", dtype=torch.float16):
        model.transformer(**batch.inputs, use_cache=False)
    listener.stop()
    for name in ("h00", "h01", "h02"):
        total, count = listener.sums[f"attention_entropy/{name}"].tolist()
        assert math.isfinite(total) and 0 < total < count

"""AdamW's update of a step: of one weight by the formula and as it came, of each block by its size."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from emoft.step.numbers import Weight


class Update:
    """Keeps the weights as they are before an update, and looks at them right after it."""

    def __init__(
        self,
        optimizer: Optimizer,
        groups: dict[str, list[nn.Parameter]],
        parameter: nn.Parameter,
        index: tuple[int, ...],
        gradient: float,
    ) -> None:
        """Keep what the update begins with.

        Args:
            optimizer: a fused AdamW, whose next step is looked at.
            groups: all parameters by block.
            parameter: that holds the chosen weight.
            index: of that weight.
            gradient: of that weight, before clipping.
        """
        self.groups, self.parameter, self.index, self.gradient = groups, parameter, index, gradient
        self.optimizer = optimizer
        self.before = {p: p.detach().clone() for parameters in groups.values() for p in parameters}
        self.state: dict[str, Tensor] = {name: x.clone() for name, x in optimizer.state.get(parameter, {}).items()}
        self.after = math.nan  # of the chosen weight
        self.ratios: dict[str, float] = {}  # by block, the norm of the update by that of the weights
        self.predicted = 0.0  # change of the loss, to first order

    @torch.no_grad()
    def look(self, *arguments: object) -> None:
        """Measure the update: a hook of the optimizer, called while the gradients are still there."""
        assert self.parameter.grad is not None
        self.after = float(self.parameter[self.index])
        # AdamW's kernel may leave the gradients clipped, or as they were: the chosen one tells which.
        left = float(self.parameter.grad[self.index]) / self.gradient if self.gradient else 1.0
        for name, parameters in self.groups.items():
            changes = [p - self.before[p] for p in parameters]
            size = math.hypot(*(float(self.before[p].norm()) for p in parameters))
            self.ratios[name] = math.hypot(*(float(change.norm()) for change in changes)) / (size or math.inf)
            self.predicted += sum(
                float((p.grad.double() * change.double()).sum()) / left
                for p, change in zip(parameters, changes, strict=True)
                if p.grad is not None
            )

    def settings(self) -> dict[str, float]:
        """Return what AdamW was told for the chosen weight."""
        group = next(g for g in self.optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "epsilon": group["eps"], "weight_decay": group["weight_decay"]}

    def weight(
        self,
        name: str,
        learning_rate: float,
        clip_factor: float,
        gradient_float32: float,
        finite_difference: float,
        nudge: float,
    ) -> Weight:
        """Return what is told of the chosen weight.

        Its update is computed in float64 by the formula (Kingma and Ba, 2015, algorithm 1; Loshchilov and Hutter, 2019,
        algorithm 2).
        """
        adam = self.settings()
        beta1, beta2 = adam["beta1"], adam["beta2"]
        m0, v0 = (float(self.state[key][self.index]) if self.state else 0.0 for key in ("exp_avg", "exp_avg_sq"))
        old, steps = float(self.before[self.parameter][self.index]), int(self.optimizer.state[self.parameter]["step"])
        gradient = self.gradient * clip_factor
        m, v = beta1 * m0 + (1 - beta1) * gradient, beta2 * v0 + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1**steps), v / (1 - beta2**steps)
        decay = -learning_rate * adam["weight_decay"] * old
        return Weight(
            name=name,
            index=list(self.index),
            gradient=self.gradient,
            gradient_float32=gradient_float32,
            finite_difference=finite_difference,
            nudge=nudge,
            before=old,
            after=self.after,
            m_before=m0,
            v_before=v0,
            m=m,
            v=v,
            m_hat=m_hat,
            v_hat=v_hat,
            decay=decay,
            update=decay - learning_rate * m_hat / (math.sqrt(v_hat) + adam["epsilon"]),
            optimizer_update=self.after - old,
            steps=steps,
        )

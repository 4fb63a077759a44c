"""What gradients have been measured, by depth in the model: kept with the run, and drawn as pictures."""

import math

from emoft.gradients.monitor import Figures
from emoft.gradients.pictures import depth_chart, heat_map
from emoft.tracking.charts import DEPTH_CHARTS
from emoft.tracking.events import EventFile
from emoft.tracking.run_state import RunState

COLUMNS = 512  # measured steps that the heat map keeps


def note_depth(run: RunState, figures: Figures) -> None:
    """Keep what was measured of each block at the latest step with the run."""
    if len(run.depth_steps) == COLUMNS:  # a long run: keep every second column
        run.depth_steps, run.depth_norms = run.depth_steps[1::2], run.depth_norms[1::2]
        run.depth_others = {kind: values[1::2] for kind, values in run.depth_others.items()}
    run.depth_steps.append(run.step)
    run.depth_norms.append(figures.depth)
    for kind in DEPTH_CHARTS:
        if kind != "gradient_norm":
            values = [figures.scalars.get(f"{kind}/h{n:02}", math.nan) for n in range(len(figures.depth))]
            run.depth_others.setdefault(kind, []).append(values)


def draw_depth(run: RunState, events: EventFile) -> None:
    """Draw a chart of each kind of figure, a curve for each step, and the heat map of all measured steps."""
    for kind, (title, in_logs) in DEPTH_CHARTS.items():
        curves = run.depth_norms if kind == "gradient_norm" else run.depth_others.get(kind, [])
        steps = run.depth_steps[len(run.depth_steps) - len(curves) :]  # an older run kept the first kind only
        if steps:
            events.add_image(f"by_depth/{kind}", depth_chart(title, steps, curves, in_logs), run.step)
    events.add_image("gradient_norm_by_block", heat_map(run.depth_steps, run.depth_norms), run.step)

"""Memory, open files and threads of a long run: `python tests/long_run.py [STEPS]`, 20,000 by default.

The real train.py on a tiny model, logging, evaluating, sampling, measuring gradients and saving all the way.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, SENTENCES, environment, read_scalars

SETTLED = 0.1  # of the run: until then caches fill


def watch(steps: int, folder: Path) -> list[tuple[int, int]]:
    """Run for so many steps; returns open files and threads, twice a second."""
    lines = [f"{text} {'and so on ' * (n % 4)}{n};{label}" for n in range(6) for text, label in SENTENCES]
    (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [
        "--model_name_or_path=",
        "--config_overrides=n_layer=2,n_embd=32,n_head=2,n_positions=64",
        "--vocab_size=300",
        "--train_file=train.txt",
        "--validation_file=train.txt",
        "--delimiter=;",
        f"--max_steps={steps}",
        f"--eval_steps={steps // 20}",
        f"--save_steps={steps // 20}",
        f"--sample_every={steps // 20}",
        f"--log_gradients_every={steps // 100}",
        "--learning_rate=1e-3",
        "--mixed_precision=no",
    ]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        env={**os.environ, **environment(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen = []
    runs, process = folder / "gpt2-emotion-finetuned/runs", Path(f"/proc/{run.pid}")
    while run.poll() is None:
        time.sleep(0.5)
        try:
            if runs.exists():
                seen.append((len(os.listdir(process / "fd")), len(os.listdir(process / "task"))))
        except OSError:
            break
    assert run.wait() == 0
    return seen


def main(steps: int) -> tuple[float, int, int]:
    """Return growth of memory, of open files and of threads from a tenth of the run to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seen = watch(steps, folder)
        memory = read_scalars(folder / "gpt2-emotion-finetuned")["speed/memory_gib"]
    early = min(memory, key=lambda step: abs(step - SETTLED * steps))
    late = sorted(memory)[-1]
    files, threads = zip(*seen[int(SETTLED * len(seen)) :], strict=True)
    print(
        f"{steps} steps: {memory[early]:.4f} GiB after step {early}, {memory[late]:.4f} GiB after step {late}"
        f" ({memory[late] / memory[early] - 1:+.2%}); open files {files[0]} to {max(files)}, threads {threads[0]} to"
        f" {max(threads)}"
    )
    return memory[late] / memory[early] - 1, max(files) - files[0], max(threads) - threads[0]


if __name__ == "__main__":
    growth, _, _ = main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    assert growth < 0.02

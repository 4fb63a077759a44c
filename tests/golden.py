"""Record what four training runs compute, to the bit, so that one version of the code can be held against another.

    python tests/golden.py                       # this version; prints one JSON object
    python tests/golden.py --root ../before      # another checkout of the project
    python tests/golden.py --stopped_by ../before    # a run that this one resumes was begun and stopped by that one

On one thread and in float32, so that the figures are the same on every processor of a kind. Two records that are equal
hold the same weights, the same logged figures and the same sample texts.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
RUNS = {
    "demo": [],
    "padded, accumulated, gradients logged": [
        "--batching=padded",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=4",
        "--max_steps=40",
        "--log_gradients_every=10",
        "--logging_steps=10",
        "--num_train_epochs=1",
    ],
    "label contrast": ["--label_contrast=0.2", "--max_steps=40", "--logging_steps=10"],
    "stopped and resumed": ["--max_steps=60", "--save_steps=20", "--logging_steps=10"],
}


def command(root: Path, output_dir: Path, flags: list[str]) -> list[str]:
    common = ["--config=demo", "--mixed_precision=no", f"--output_dir={output_dir}"]
    return [sys.executable, str(root / "train.py"), *common, *flags]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}


def train(root: Path, folder: Path, flags: list[str]) -> None:
    subprocess.run(command(root, folder / "run", flags), env=environment(folder), check=True, stdout=subprocess.DEVNULL)


def stop_after_a_checkpoint(root: Path, folder: Path, flags: list[str]) -> None:
    """Begin a run, and end it by SIGTERM once it has saved for the first time."""
    process = subprocess.Popen(command(root, folder / "run", flags), env=environment(folder), stdout=subprocess.DEVNULL)
    while not list((folder / "run").glob("checkpoint-*")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, "the run was to be stopped by SIGTERM"


def record(output_dir: Path) -> dict[str, str]:
    """What a finished run computed: a checksum of each kind of result."""
    weights = hashlib.sha256()
    with safe_open(output_dir / "model.safetensors", "pt") as tensors:
        for name in sorted(tensors.keys()):
            weights.update(name.encode() + tensors.get_tensor(name).numpy().tobytes())
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    events = EventAccumulator(str(output_dir / "runs"), size_guidance={"tensors": 0}).Reload()
    samples = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in sorted(events.Tags()["tensors"])
        if tag.startswith("samples/")
    }
    assert samples and history
    return {
        "weights": weights.hexdigest(),
        "log_history": digest(history),
        "samples": digest(samples),
        "last_loss": repr(next(entry["loss"] for entry in reversed(history) if "loss" in entry)),
    }


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to run")
    parser.add_argument("--stopped_by", type=Path, help="the checkout that begins the run that is stopped")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="names of runs")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    records = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            flags = RUNS[name]
            if name == "stopped and resumed":
                stop_after_a_checkpoint((arguments.stopped_by or root).resolve(), Path(folder), flags)
                flags = [*flags, "--resume_from_checkpoint=latest"]
            train(root, Path(folder), flags)
            records[name] = record(Path(folder) / "run")
    print(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()

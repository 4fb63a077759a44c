"""How often the intervals of emoft.compare hold the truth, by simulation: `python tests/coverage.py`, some minutes."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "compare")]

from test_statistics import coverage  # noqa: E402

if __name__ == "__main__":
    print("| texts | models a side | draws | intervals that hold the truth |\n| ---: | ---: | ---: | ---: |")
    for texts, models in ((100, 1), (500, 1), (2000, 1), (500, 3), (500, 5)):
        print(f"| {texts:,} | {models} | 500 | {coverage(500, texts, seed=texts, models=models):.1%} |", flush=True)

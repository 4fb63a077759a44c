"""The README says what is so: its flags exist, its pointers point, its links lead somewhere."""

import re

from conftest import ROOT

from emoft.benchmark.config import BenchmarkConfig
from emoft.config import EvaluateConfig, GenerateConfig, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_it_names_exists() -> None:
    configs = (TrainConfig, GenerateConfig, EvaluateConfig, BenchmarkConfig)
    known = {"config", "help"}.union(*(config.__dataclass_fields__ for config in configs))
    known |= {f"no_{name}" for name in known}
    others = {"logdir", "samples_per_plugin"}  # of tensorboard
    others |= {"standalone", "nnodes", "nproc_per_node", "max_restarts", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
    others |= {"shutdown_timeout"}
    others |= {"nodes", "ntasks", "gpus", "cpus", "signal", "requeue"}  # of Slurm
    named = set(re.findall(r"--([a-z_]+)", README))
    assert named - known - others == set()


def test_every_link_to_a_file_leads_to_one() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_default_of_the_tutorials_table_is_the_programs() -> None:
    rows = re.findall(r"^\| [^|]+ \| `--(\w+)` \| (?:`([^`]+)`|([\w.-]+))", README, flags=re.MULTILINE)
    assert len(rows) >= 10
    for name, text, number in rows:
        default = getattr(TrainConfig, name)
        if isinstance(default, bool):
            assert number == ("on" if default else "off"), name
        elif isinstance(default, str):
            assert (text or number) == default, name
        else:
            assert float(number) == default, name

"""Two hosts on one machine: network namespaces joined by a veth pair, torchrun in each: `python tests/hosts.py`.

The two must end like a single process; and when the link between them is cut in the middle of a run, both sides must
end, lose nothing that was saved, and end like the undisturbed run when they are started again. The one that is cut off
from where all meet ends when its kernel gives up on the connection: see RETRIES. Needs root, iproute2, and the right to
make network namespaces.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, SENTENCES

ADDRESSES = ("10.77.83.1", "10.77.83.2")
PORT = 29577
RETRIES = 8  # of a packet that is not confirmed, net.ipv4.tcp_retries2: 102 s; by default 15, which takes 924 s


def why_not() -> str:
    """Return what keeps this machine from having two hosts, or nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs ip, of iproute2"
    probe = subprocess.run(["ip", "netns", "add", "emoft-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "emoft-probe"], capture_output=True)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else ""


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@contextlib.contextmanager
def two_hosts(retries: int = RETRIES) -> Iterator[list[str]]:
    """Make two namespaces with a link between them; gives their names."""
    names = [f"emoft-{os.getpid()}-{host}" for host in "ab"]
    links = [f"em{os.getpid()}{host}" for host in "ab"]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {links[0]} netns {names[0]} type veth peer name {links[1]} netns {names[1]}")
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip(f"-n {name} address add {address}/24 dev {link}")
            ip(f"-n {name} link set {link} name wire")
            ip(f"-n {name} link set wire up")
            ip(f"-n {name} link set lo up")
            ip(f"netns exec {name} sysctl -q -w net.ipv4.tcp_retries2={retries}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(host: str, address: str, folder: Path, script: str, words: list[str], options: list[str]) -> subprocess.Popen:
    """Start torchrun on a host, as the README says; by a name in common, it cannot know which one meets the others."""
    is_first = "true" if address == ADDRESSES[0] else "false"
    command = [
        "ip",
        "netns",
        "exec",
        host,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}",
        "--rdzv_id=emoft",
        f"--local_addr={address}",
        f"--rdzv_conf=is_host={is_first}",
        *options,
        script,
        *words,
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (folder / f"{host}.log").open("w")
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def run_on_both(
    hosts: list[str],
    folder: Path,
    words: list[str],
    script: str = "",
    options: list[str] | None = None,
    cut_after: str = "",
) -> list[float]:
    """Train on both hosts; cut the link once a path is there, if told.

    Returns:
        The seconds until each host ended, since the cut or since the start.
    """
    script = script or str(ROOT / "train.py")
    pairs = zip(hosts, ADDRESSES, strict=True)
    processes = [start(host, address, folder, script, words, options or []) for host, address in pairs]
    try:
        began = time.monotonic()
        if cut_after:
            while not (folder / cut_after).exists():
                assert time.monotonic() - began < 120, logs(hosts, folder)
                time.sleep(0.05)
            ip(f"-n {hosts[0]} link set wire down")
            began = time.monotonic()
        ended: dict[int, float] = {}
        while len(ended) < 2:
            for number, process in enumerate(processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic() - began
            assert time.monotonic() - began < 180, logs(hosts, folder)
            time.sleep(0.1)
        if cut_after:
            ip(f"-n {hosts[0]} link set wire up")
        else:
            assert [process.returncode for process in processes] == [0, 0], logs(hosts, folder)
        return [ended[0], ended[1]]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def logs(hosts: list[str], folder: Path) -> str:
    return "\n".join(f"{host}:\n{(folder / f'{host}.log').read_text(errors='replace')[-30000:]}" for host in hosts)


def write_data(folder: Path) -> None:
    lines = [f"{text} {'and so on ' * (n % 4)}{n};{label}" for n in range(6) for text, label in SENTENCES]
    (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def words_of(output_dir: str, batch_size: int, **settings: object) -> list[str]:
    values = {
        "model_name_or_path": "",
        "config_overrides": "n_layer=2,n_embd=32,n_head=2,n_positions=64,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
        "vocab_size": 300,
        "train_file": "train.txt",
        "delimiter": ";",
        "num_train_epochs": 40,
        "save_steps": 20,
        "mixed_precision": "no",
        "resume_from_checkpoint": "latest",
        "per_device_train_batch_size": batch_size,
        "output_dir": output_dir,
        **settings,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def main() -> None:
    from distributed.test_world import assert_same

    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
        folder = Path(name)
        write_data(folder)
        subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words_of("single", 8)],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for parallel in ("ddp", "fsdp"):
            run_on_both(hosts, folder, words_of(parallel, 4, parallel=parallel))
            assert_same(folder / parallel, folder / "single")
            print(f"{parallel} on two hosts: the same as a single process", flush=True)
            cut = f"cut-{parallel}"
            seconds = run_on_both(hosts, folder, words_of(cut, 4, parallel=parallel), cut_after=f"{cut}/checkpoint-100")
            print(f"the link cut: the hosts ended after {seconds[0]:.0f} and {seconds[1]:.0f} s", flush=True)
            assert max(seconds) < 150
            saved = sorted(path.name for path in (folder / cut).glob("checkpoint-*"))
            run_on_both(hosts, folder, words_of(cut, 4, parallel=parallel))
            assert_same(folder / cut, folder / "single")
            print(f"started again from one of {', '.join(saved)}: the same end", flush=True)


if __name__ == "__main__":
    main()

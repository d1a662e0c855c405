"""How much faster several workers prewarm than one: ``python -m tests.gpu.crew_speed FOLDER --workers 1`` (then 2, 4).

Each worker has a GPU and the same number of cores. A call may be limited with ``--seconds`` and repeated until it says
"done": prewarm goes on where it was, and the times add up. ``FOLDER/times.json`` has the seconds for each number of
workers; with two numbers in it the ratio is printed. The problems (24 as they stand) are training problems of bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def shapes() -> list[dict[str, object]]:
    """Returns 24 shapes, each a problem of its own on any GPU."""
    varied = itertools.product((512, 1024, 2048, 4096), (64, 128), (0, 8, 24))
    fixed = {
        "batch": 2,
        "nheads": 16,
        "causal": True,
        "dtype": "bfloat16",
        "grads": ["q", "k", "v", "q_bias", "k_bias"],
    }
    return [{**fixed, "seqlen_q": rows, "headdim": headdim, "rank": rank} for rows, headdim, rank in varied]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stops torchrun, which stops its workers, and then whatever is left of them."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Prewarms with so many workers and adds up the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--budget", type=float, default=30.0)
    options = parser.parse_args()
    folder = options.folder / f"workers-{options.workers}"
    folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "shapes.json").write_text(json.dumps(shapes()), encoding="utf-8")
    import torch

    gpus = torch.cuda.device_count()
    assert gpus >= options.workers, f"{options.workers} workers need as many GPUs, and there are {gpus}"
    cores = sorted(os.sched_getaffinity(0))
    # As many cores for each worker whatever their number: those of one GPU's share of the machine.
    os.sched_setaffinity(0, cores[: len(cores) // gpus * options.workers])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "prewarm.py"), str(options.folder / "shapes.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLASHBIAS_CACHE_DIR": str(folder)}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "4"}
    started = time.monotonic()
    with subprocess.Popen(
        [*command, "--budget", str(options.budget)], env=environment, start_new_session=True
    ) as process:
        try:
            code = process.wait(options.seconds)
            status = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = "not done yet: call this again"
            _end(process)
    path = options.folder / "times.json"
    times: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name = str(options.workers)
    times[name] = times.get(name, 0.0) + time.monotonic() - started
    path.write_text(json.dumps(times), encoding="utf-8")
    sys.stdout.write(f"{options.workers} workers: {times[name]:.0f} s in all, {status}\n")
    for more, seconds in times.items():
        if more != "1" and "1" in times:
            sys.stdout.write(f"{more} workers are {times['1'] / seconds:.2f}x as fast as one\n")


if __name__ == "__main__":
    main()

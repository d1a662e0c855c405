"""What the driver says of this GPU, that a parent which only tunes makes no context, and how a child is given its device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autotune import driver
from autotune.device import describe
from autotune.surroundings import HOME

pytestmark = pytest.mark.timeout(300)

PREWARM = """
import sys
from autotune import driver
from flashbias.cli.main import main
from flashbias.cli.prewarm import main as prewarm
folder = sys.argv[1]
shape = ["--batch", "1", "--nheads", "4", "--seqlen-q", "128", "--headdim", "64", "--grads", "none"]
assert prewarm([*shape, "--cache-dir", folder, "--budget", "30"]) == 0
assert main(["verify", "--all", "--cache-dir", folder]) == 0
asked = driver.started()
print("context:", asked.has_context(0))
"""
FINGERPRINT = """
import sys
from autotune.device import describe
from autotune.sandbox import Sandbox
from tests.autotune.planted_spec import planted_problem
device = describe(0)
with Sandbox(planted_problem(device=device), device) as sandbox:
    print("fingerprints:", len(set(sandbox.fingerprints(1))), device.uuid)
"""


def run(code: str, visible: str | None, *arguments: str) -> str:
    """Returns the last line that ``code`` says in a fresh process which sees the devices ``visible``."""
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    paths = [
        HOME,
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]  # the latter where packages lie outside of this Python
    variables |= {"PYTHONPATH": os.pathsep.join(paths)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_driver_knows_this_gpu() -> None:
    """It is in the default compute mode, has this process's context, and the UUID that torch and nvidia-smi know."""
    torch.ones(1, device="cuda")
    asked = driver.started()
    assert asked is not None
    assert asked.compute_mode(0) == driver.DEFAULT
    assert asked.has_context(0) is True
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert describe(0).uuid in listed
    assert asked.compute_mode(99) is None


def test_describing_a_device_makes_no_context() -> None:
    """An exclusive GPU would have no place for a second one, that of the child."""
    code = "from autotune import driver\nfrom autotune.device import describe\ndescribe(0)\nprint(driver.started().has_context(0))"
    assert run(code, os.environ.get("CUDA_VISIBLE_DEVICES")) == "False"


def test_a_parent_that_prewarms_and_verifies_has_no_context(tmp_path: Path) -> None:
    """Only the child uses the GPU, so that prewarm works where one process may."""
    assert run(PREWARM, os.environ.get("CUDA_VISIBLE_DEVICES"), str(tmp_path)) == "context: False"


@pytest.mark.parametrize("form", ["unset", "number", "uuid", "abbreviated"])
def test_a_child_finds_its_device_however_it_is_named(form: str) -> None:
    """Each form of CUDA_VISIBLE_DEVICES leads caller and child to one GPU."""
    uuid = describe(0).uuid
    forms = {"unset": None, "number": "0", "uuid": uuid, "abbreviated": uuid[:12]}
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in (None, "0", uuid) and form in ("unset", "number"):
        pytest.skip("here CUDA_VISIBLE_DEVICES chooses among several devices")
    told = run(FINGERPRINT, forms[form])
    assert told.startswith("fingerprints: 1 ")
    if form not in ("unset", "number"):
        assert told.endswith(uuid)

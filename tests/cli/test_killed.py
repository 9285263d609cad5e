"""A registration that is killed at any moment leaves its output folder as it was, or whole; the next one tidies up.

REGKIT_KILLS=50 kills it so often; a few times otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import write_scan

KILLS = int(os.environ.get("REGKIT_KILLS", "4"))
# a process that has loaded everything makes children that are killed: each then takes a fraction of a second
SCRIPT = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import regkit.cli
import regkit.registration.align, regkit.registration.apply, regkit.report.overlay, regkit.report.page

out, fixed, moving, kills = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])

def start(model):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(regkit.cli.run(["register", fixed, moving, "-o", str(out), "--model", model, "--overwrite", "--quiet"]))
    return child

def state():
    files = sorted(out.iterdir()) if out.exists() else []
    record = out / "registration.json"
    model = json.loads(record.read_text())["settings"]["model"] if record.exists() else None
    return [file.name for file in files], model

began = time.monotonic()
assert os.waitpid(start("rigid"), 0)[1] == 0
names, model = state()
begun = time.monotonic()
os.waitpid(start("rigid"), 0)
whole = time.monotonic() - begun
draw, seen, finished = random.Random(0), [], 0
for number in range(kills):
    wanted = "affine" if model == "rigid" else "rigid"
    child = start(wanted)
    time.sleep(whole * (0.2 if number == 0 else draw.choice([draw.uniform(0, 1), draw.uniform(0.8, 1.1)])))
    os.kill(child, signal.SIGKILL)
    code = os.waitpid(child, 0)[1]
    found, there = state()
    assert found == names, (number, found)
    assert there == wanted if code == 0 else there in (model, wanted), (number, code, there)
    seen.append(there == wanted)
    model = there
assert os.waitpid(start("rigid"), 0)[1] == 0
print(json.dumps({"names": names, "left": sorted(p.name for p in out.parent.iterdir()), "new": sum(seen), "of": len(seen)}))
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_killed_registration_leaves_the_old_result_or_the_new_one_whole(ndim, tmp_path):
    scans = [write_scan(tmp_path / f"{name}.nii.gz", ndim, person) for person, name in enumerate(("fixed", "moving"))]
    before = [path.read_bytes() for path in scans]
    place = tmp_path / "results"
    place.mkdir()
    run = subprocess.run([sys.executable, "-c", SCRIPT, place / "out", *scans, str(KILLS)], capture_output=True, text=True, timeout=900,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["left"] == ["out"] and "registration.json" in told["names"] and told["of"] == KILLS
    assert told["new"] < KILLS  # some were killed before the end
    assert [path.read_bytes() for path in scans] == before

"""All that regkit promises about faults, tried in full: killed registrations, full disks, locked folders, and thousands of hostile files.

    python pipelines/faults/run.py -o OUT [--kills 50] [--cases 4000] [--seeds 0,1,2]

`make test` tries the same in small. Needs what `pip install -e ".[test]"` brings, and Linux. Exit code 1 if anything is found;
OUT/seed-S holds what the fuzzer says of each seed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/cli/test_killed.py", "tests/io/test_output.py", "tests/io/test_whole.py", "tests/io/test_memory.py",
         "tests/io/test_paths.py", "tests/cli/test_bad_input.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50, help="registrations that are killed, in 2D and in 3D each")
    parser.add_argument("--cases", type=int, default=4000, help="hostile files a seed")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    lines = {"tests": [sys.executable, "-m", "pytest", "-q", *TESTS]}
    for seed in given.seeds.split(","):
        lines[f"seed {seed}"] = [sys.executable, str(ROOT / "pipelines" / "fuzz" / "run.py"), "--seed", seed, "--cases", str(given.cases),
                                 "-o", str((given.output / f"seed-{seed}").resolve())]
    codes = {}
    for name, line in lines.items():
        print(f"== {name}", flush=True)
        codes[name] = subprocess.run(line, cwd=ROOT, env={**os.environ, "REGKIT_KILLS": str(given.kills)}).returncode
    print("; ".join(f"{name}: {'well' if code == 0 else f'FOUND (exit code {code})'}" for name, code in codes.items()))
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())

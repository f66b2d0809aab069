"""How long from process start to the first answer, in an environment without torch and tvm.

    python -m benchmarks.start_up r56.exitify picture.png --python /path/to/device/python

Runs `exitify run` as a process of its own, again and again; the first run, which fills the disk cache, is named apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    check = "import importlib.util as u; print([name for name in ('torch', 'tvm') if u.find_spec(name)] or 'neither torch nor tvm')"
    print(subprocess.run([options.python, "-c", check], capture_output=True, text=True, check=True).stdout.strip(), "installed")
    given = (options.artifact, options.picture, "--engine", options.engine)
    seconds = []
    for _ in range(options.runs + 1):
        started = time.perf_counter()
        subprocess.run([options.python, "-m", "exitify", "run", *map(str, given)], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    low, middle, high = np.percentile(seconds[1:], (25, 50, 75))
    spread = f"quartiles {low:.3f} to {high:.3f}, most {max(seconds[1:]):.3f}"
    print(f"first {seconds[0]:.3f} s; then median {middle:.3f} s ({spread}) over {options.runs} runs")


if __name__ == "__main__":
    main()

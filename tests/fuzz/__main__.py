"""`python -m fuzz [TARGET ...] [--seconds 600] [--seed N]`: change valid files at random, and see who reads them fail.

A case is good if it is read, or refused with a PrecastError. What is not is written to `seeds/TARGET/`, once for each
place where it fails, and named at the end; the command then exits with 1. `--replay` runs the kept cases alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Fuzz one target after the other; 1 if any case failed."""
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run")
    parser.add_argument("--replay", action="store_true", help="run the kept cases alone")
    options = parser.parse_args()
    _with_a_fence()
    warnings.simplefilter("ignore")
    from .targets import TARGETS

    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    seed = random.randrange(2**31) if options.seed is None else options.seed
    failed = 0
    for name in options.targets or TARGETS:
        failed += _fuzz(name, 0 if options.replay else options.seconds, seed)
    return 1 if failed else 0


def _fuzz(name: str, seconds: float, seed: int) -> int:
    """How many kinds of failures there are."""
    from .targets import TARGETS
    from .worker import Worker

    target, chance = TARGETS[name], random.Random(seed)
    seeds = list(target.seeds())
    corpus, known, failures = list(seeds), set(), {}
    worker = Worker(target.run, target.prepare)
    done, end = 0, time.monotonic() + seconds
    while done < len(seeds) or time.monotonic() < end:
        case = seeds[done] if done < len(seeds) else target.change(chance, chance.choice(corpus))
        outcome = worker.outcome(case)
        done += 1
        if not outcome.is_good and outcome.kind not in failures and not worker.outcome_alone(case).is_good:
            failures[outcome.kind] = _kept(name, case) if case not in seeds else "a seed"
            print(f"{name}: {outcome.text}\n    {failures[outcome.kind]}: {case[:300]!r}", flush=True)
        # A refusal in other words comes from another place, from which more can be reached.
        said = re.sub(r"[^a-zA-Z ]", "", outcome.text)[:120]
        if said not in known and outcome.is_good and len(corpus) < 5000:
            known.add(said)
            corpus.append(case)
    worker.close()
    print(f"{name}: {done:,} cases, {len(failures)} kinds of failures (--seed {seed})", flush=True)
    return len(failures)


def _kept(name: str, case: bytes) -> str:
    path = HERE / "seeds" / name / f"found-{hashlib.sha256(case).hexdigest()[:10]}"
    path.write_bytes(case)
    return os.fspath(path)


def _with_a_fence() -> None:
    """Begin again with memory that ends at pages nobody may touch, where there is a compiler to make that."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if "PRECAST_FENCE" in os.environ or not sys.platform.startswith("linux") or compiler is None:
        return
    library = Path(tempfile.mkdtemp(prefix="precast-fence-")) / "fence.so"
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, HERE / "fence.c"], check=True)
    paths = os.pathsep.join(
        [os.fspath(HERE.parent), os.fspath(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")]
    )
    own = {"PRECAST_FENCE": "1", "LD_PRELOAD": os.fspath(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
           "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
           "PRECAST_HOME": os.fspath(library.parent / "home")}  # fmt: skip
    os.execve(sys.executable, [sys.executable, "-W", "ignore", "-m", "fuzz", *sys.argv[1:]], os.environ | own)


if __name__ == "__main__":
    sys.exit(main())

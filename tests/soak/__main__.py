"""`python -m soak [--seconds 600] [--seed N]`: use one model in every way at random, for a long time.

Conversations go on, go back and begin anew, in batches, streams that are left in the middle, beams, guesses, and
sessions of two threads. Every answer must be the one that eager transformers gives for the row alone, and memory,
threads and open files must not grow. What differs is printed with the seed that repeats it; the command then exits
with 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import tiny

CAPACITY = 48
FAMILIES = ("llama", "mistral", "gpt2")
"""A plain one; windows, which forget; learned positions."""
GROWTH = 64 * 2**20
"""Bytes: allocators keep some of what they once had."""


class Soak:
    """One model and the text so far of each of its conversations."""

    def __init__(self, folder: Path, family: str, chance: random.Random) -> None:
        from precast.exporter import export
        from precast.runtime import CompiledModelForCausalLM

        self.source = tiny.save_checkpoint(folder / family, tiny.config_for(family, num_hidden_layers=2))
        made = export(
            str(self.source), folder / f"{family}-out", batch_size=2, dynamic_batch_size=True,
            sequence_length=(CAPACITY,), prefill_lengths=(4, 16) if family == "gpt2" else (), validate=False,
        )  # fmt: skip
        self.model = CompiledModelForCausalLM.from_pretrained(made.path)
        self.chance, self.text = chance, [1]
        self.ways: list[Callable[[], None]] = [
            self.go_on, self.go_back, self.ask_many, self.leave_a_stream, self.search, self.ask_at_once, self.reset,
        ]  # fmt: skip
        # Guesses need graphs that take any number of tokens.
        if self.model.artifact.contract.variants[0].graphs[0].name == "prefill":
            self.ways.append(self.guess)

    def step(self) -> None:
        """Do one thing. Raises AssertionError where an answer is wrong."""
        self.chance.choice(self.ways)()

    def go_on(self) -> None:
        self.text = (self.text + self._new(6))[-30:]
        self.text += self._check([self.text], self._count())[0]

    def go_back(self) -> None:
        self.text = self.text[: self.chance.randint(1, len(self.text))]
        self.go_on()

    def ask_many(self) -> None:
        self._check([self._new(20) for _ in range(self.chance.randint(2, 5))], self._count())

    def leave_a_stream(self) -> None:
        row, count = self._new(20), self._count()
        stream = self.model.stream(np.array([row]), max_new_tokens=count)
        wanted = self.chance.randint(1, count)
        found = list(itertools.islice(stream, wanted))
        stream.close()
        expected = self._compare(row, found, count)
        assert len(found) == min(wanted, len(expected)), f"{row} is answered by {found}, {wanted} tokens of {expected}"

    def search(self) -> None:
        row, count = self._new(12), self._count()
        found = self.model.generate(np.array([row]), max_new_tokens=count, num_beams=2, do_sample=False)
        expected = oracle.greedy(self.source, row, max_new_tokens=count, num_beams=2)
        assert found[0, len(row) :][: len(expected)].tolist() == expected, f"beams of {row}"

    def guess(self) -> None:
        row, count = self._new(4) * 4, self._count()
        found = self.model.generate(np.array([row]), max_new_tokens=count, prompt_lookup_num_tokens=3)
        self._compare(row, found[0, len(row) :].tolist(), count)

    def ask_at_once(self) -> None:
        """Two threads, a session for each; transformers, which is asked afterwards, is not made for threads."""
        rows, count, found = [self._new(20), self._new(20)], self._count(), {}

        def ask(index: int, model: Any) -> None:
            found[index] = model.generate(np.array([rows[index]]), max_new_tokens=count, do_sample=False)

        sessions = enumerate((self.model, self.model.new_session()))
        threads = [threading.Thread(target=ask, args=each) for each in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, row in enumerate(rows):
            assert index in found, f"the session of {row} raised an error"
            self._compare(row, found[index][0, len(row) :].tolist(), count)

    def reset(self) -> None:
        self.model.reset()
        self.text = [1]

    def _new(self, most: int) -> list[int]:
        return [self.chance.randint(3, tiny.VOCABULARY - 1) for _ in range(self.chance.randint(1, most))]

    def _count(self) -> int:
        return self.chance.randint(1, 12)

    def _check(self, rows: list[list[int]], count: int) -> list[list[int]]:
        ids, mask = oracle.padded(rows, self.chance.choice(["left", "right"]))
        found = self.model.generate(ids, mask, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :]
        return [self._compare(row, values.tolist(), count) for row, values in zip(rows, found, strict=True)]

    def _compare(self, row: list[int], found: list[int], count: int) -> list[int]:
        """The eager answer, which `found` begins; where two tokens are as likely up to rounding, either will do."""
        expected = oracle.greedy(self.source, row, max_new_tokens=count)
        for index, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
            if mine != theirs:
                logits = np.sort(oracle.logits(self.source, row + expected[:index])[-1])
                assert logits[-1] - logits[-2] < 1e-4, f"{row} is answered by {found}, not by {expected}"
                break
        return expected


def main() -> int:
    """Soak one model of each family; 1 if any answer was wrong or anything grew."""
    parser = argparse.ArgumentParser("python -m soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="in all")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from precast.exporter import quiet_libraries

    quiet_libraries()
    seed = random.randrange(2**31) if options.seed is None else options.seed
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            failed += _soak(Soak(Path(folder), family, random.Random(seed)), family, options.seconds / len(FAMILIES))
    print(f"--seed {seed}")
    return 1 if failed else 0


def _soak(soak: Soak, family: str, seconds: float) -> bool:
    """Whether it failed."""
    done, before, end = 0, None, time.monotonic() + seconds
    # A third of the time goes by before anything is counted: pools of memory and of threads are full by then.
    count_from = time.monotonic() + seconds / 3
    while time.monotonic() < end or before is None:
        try:
            soak.step()
        except AssertionError as error:
            print(f"{family}: step {done}: {error}")
            return True
        done += 1
        if before is None and time.monotonic() > count_from:
            before = _held()
    after = _held()
    print(f"{family}: {done:,} steps; {', '.join(f'{name} {before[name]:,} -> {after[name]:,}' for name in after)}")
    limits = {"bytes": GROWTH, "threads": 0, "files": 0}
    grown = [name for name in after if after[name] > before[name] + limits[name]]
    if grown:
        print(f"{family}: {', '.join(grown)} grew")
    return bool(grown)


def _held() -> dict[str, int]:
    gc.collect()
    if sys.platform.startswith("linux"):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"bytes": resident, "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "threads": threading.active_count()}


if __name__ == "__main__":
    sys.exit(main())

"""Answer lines of {"src", "tgt"} in both modes: by transformers as it is, and compiled.

python examples/predictor.py rounds.jsonl
"""

import argparse
import json
from pathlib import Path

from precast.runtime.runner import open_model
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.generating import GeneratingWorker
from precast.runtime.runner.rows import Column, read_rows

SETTINGS = {"max_new_tokens": 16, "do_sample": False}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    asked = parser.parse_args()

    rows, found = read_rows(asked.file), []
    for mode in ("eager", "compiled"):
        model = open_model(asked.model, mode, batch_size=2, sequence_length=256)
        # Longer prompts lose their beginning.
        worker = GeneratingWorker(model, Column(rows, "src", ()), SETTINGS, max_input_tokens=128)
        target = Path(f"{mode}.json")
        summary = answer_file(rows, target, {"model": mode}, lambda seed, worker=worker: worker, force=True)
        print(f"{target}: {summary.rows} rows, {summary.to_json()['rows_per_second']} rows/s")
        found.append([json.loads(line) for line in target.read_text("utf-8").splitlines()])
    print(f"{sum(map(dict.__eq__, *found))} of {len(rows)} answers are the same")

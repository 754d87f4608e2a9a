"""Continue prompts three ways: several at once, streamed to the terminal, and a file of them.

python examples/text_generation.py texts.txt [--ranks 3]
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, TextStreamer

from precast.runtime import pipeline
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.generating import GeneratingWorker
from precast.runtime.runner.rows import Column, read_rows

PROMPTS = ["I love Beijing, because", "Water boils at", "Hugging Face is"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a prompt on each line")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the model's weights")
    asked = parser.parse_args()
    several = {"backend": "aoti", "tensor_parallel": asked.ranks} if asked.ranks > 1 else {}
    generate = pipeline("text_generation", asked.model, export=True, batch_size=4, sequence_length=512, **several)

    # What is said at the call goes before the checkpoint's own settings.
    for prompt, answer in zip(PROMPTS, generate(PROMPTS, max_new_tokens=16, do_sample=False), strict=True):
        print(f"{prompt!r}: {answer[0]['generated_text']!r}")

    # A streamer of transformers, as it is.
    generate(PROMPTS[0], max_new_tokens=16, streamer=TextStreamer(AutoTokenizer.from_pretrained(asked.model)))

    # A short last batch is filled up; a backslash and an n within a line is a line break.
    rows = read_rows(asked.file, line_breaks=True)
    worker = GeneratingWorker(generate.model, Column(rows, None, ("prompt",)), {"max_new_tokens": 16})
    done = answer_file(rows, Path("text_generation_result.txt"), {}, lambda seed: worker, force=True)
    print(f"text_generation_result.txt: {done.rows} rows, {done.to_json()['rows_per_second']} rows/s")

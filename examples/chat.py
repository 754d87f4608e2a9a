"""Talk to a compiled decoder; an empty line ends it.

python examples/chat.py
"""

import argparse
import sys

from precast.runtime import CompiledModel, TextStream


def main() -> None:
    """Read lines, and answer each while it is generated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quantize", default="int8", help="none keeps float32")
    asked = parser.parse_args()

    # Questions and answers together may have 1,024 tokens. What was read already stays in the cache.
    model = CompiledModel.from_pretrained(asked.model, export=True, sequence_length=1024, quantize=asked.quantize)
    messages = []
    for line in map(str.strip, sys.stdin):
        if not line:
            break
        messages.append({"role": "user", "content": line})
        prompt = model.tokenizer.apply_chat_template(messages)
        text, answer = TextStream(model.tokenizer), ""
        ids = model.tokenizer.encode(prompt, add_special_tokens=False)
        for piece in (*map(text.put, model.stream([ids], max_new_tokens=128)), text.end()):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()

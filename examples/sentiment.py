"""Say of texts whether they are positive.

python examples/sentiment.py "A film to remember." "Two hours that I want back."
"""

import argparse

from precast.runtime import CompiledModel, pipeline


def main() -> None:
    """Classify the texts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased-finetuned-sst-2-english")
    asked = parser.parse_args()

    # Compiled for two lengths over one set of weights; more than eight texts run in slices of eight.
    model = CompiledModel.from_pretrained(
        asked.model, export=True, batch_size=8, sequence_length=(32, 128), dynamic_batch_size=True
    )
    classify = pipeline("text-classification", model)
    for text, answer in zip(asked.texts, classify(asked.texts), strict=True):
        print(f"{answer['label']:<10} {answer['score']:.3f}  {text}")


if __name__ == "__main__":
    main()

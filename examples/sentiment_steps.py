"""Sentiment in English and Chinese: a pipeline, its three steps one by one, LLM.int8, and what weights take.

python examples/sentiment_steps.py
"""

import argparse

from precast.runtime import pipeline

ENGLISH = ["I've been waiting for a HuggingFace course my whole life.", "I hate this so much!"]
CHINESE = ["今天心情很好", "这家店的服务太差了"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased-finetuned-sst-2-english")
    parser.add_argument("--chinese", default="uer/roberta-base-finetuned-dianping-chinese")
    asked = parser.parse_args()

    for name, texts in ((asked.model, ENGLISH), (asked.chinese, CHINESE)):
        classify = pipeline("sentiment-analysis", name, export=True, batch_size=2, sequence_length=64)
        for text, answer in zip(texts, classify(texts), strict=True):
            print(f"{text}  {answer['label']}  {answer['score']:.4f}")

        # The same in three steps: texts become ids and a mask, these logits, and logits labels and probabilities.
        inputs = classify.preprocess(texts)
        print({key: array.shape for key, array in inputs.items()})
        outputs = classify.forward(inputs)
        print(outputs["logits"].round(4))
        print(classify.postprocess(outputs))

        # As transformers counts: the bytes of parameters and buffers.
        small = pipeline("sentiment-analysis", name, export=True, batch_size=2, sequence_length=64,
                         quantize="int8", quantize_method="llm.int8")  # fmt: skip
        print([answer["label"] for answer in small(texts)])
        print(f"{classify.model.get_memory_footprint():,} bytes, {small.model.get_memory_footprint():,} by LLM.int8")

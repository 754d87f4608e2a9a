"""optimum-neuron's guide in its own words: a classifier and a decoder, compiled, kept and asked.

python examples/neuron_guide.py "Hamilton is considered to be the best musical of human history."
"""

import argparse

from transformers import AutoTokenizer

from precast.runtime import CompiledModelForCausalLM, CompiledModelForSequenceClassification

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased-finetuned-sst-2-english")
    parser.add_argument("--decoder", default="openai-community/gpt2")
    parser.add_argument("--backend", default="export", help="neuron, where AWS's compiler is installed")
    asked = parser.parse_args()

    compiler_args = {"auto_cast": "matmul", "auto_cast_type": "bf16", "backend": asked.backend}
    input_shapes = {"batch_size": 1, "sequence_length": 64}
    model = CompiledModelForSequenceClassification.from_pretrained(
        asked.model, export=True, **compiler_args, **input_shapes
    )
    model.save_pretrained("sentiment_neuron", force=True)

    # What it was compiled with lies in its config.json: nothing is said again.
    model = CompiledModelForSequenceClassification.from_pretrained("sentiment_neuron", trust_native_code=True)
    inputs = AutoTokenizer.from_pretrained("sentiment_neuron")(asked.text, return_tensors="pt")
    logits = model(**inputs).logits
    print(model.config.id2label[logits[0].argmax().item()])

    decoder = CompiledModelForCausalLM.from_pretrained(asked.decoder, export=True, batch_size=1, sequence_length=256)
    tokenizer = AutoTokenizer.from_pretrained(asked.decoder)
    tokens = tokenizer("I really wish ", return_tensors="pt")
    sample = decoder.generate(**tokens, do_sample=True, min_length=128, max_length=256, temperature=0.7)
    print(tokenizer.decode(sample[0]))

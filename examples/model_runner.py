"""Answer questions with a loop of your own: nothing is said twice, and what was read is counted.

python examples/model_runner.py "What is the capital of France?" [--world-size 3]
"""

import argparse

from precast.runtime.runner import ModelRunner


class Terse(ModelRunner):
    """Overrides three hooks; docs/runner.md has the others."""

    def model_generate(self, prompts, warm_up=False):
        """Put prompts through the chat template first."""
        self.read, talks = 0, [[{"role": "user", "content": prompt}] for prompt in prompts]
        return super().model_generate(self.tokenizer.apply_chat_template(talks), warm_up)

    def model_input_prepare(self, input_dict):
        """Count the tokens that the next step reads."""
        prepared = super().model_input_prepare(input_dict)
        self.read += prepared.get("attention_mask", prepared["is_active"]).sum()
        return prepared

    def model_output_process(self, model_inputs, outputs, input_dict):
        """Rule out the tokens that an answer has already."""
        for logits, said in zip(outputs, input_dict["generate_ids"], strict=True):
            logits[said] = float("-inf")
        super().model_output_process(model_inputs, outputs, input_dict)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--world-size", type=int, default=1, help="processes; several run a compiled model")
    asked = parser.parse_args()
    mode = "ge_graph" if asked.world_size > 1 else "eager"
    sizes = {"batch_size": 4, "input_max_len": 496, "max_new_tokens": 16}
    own = {"model_config": {"dtype": "float32"}, "data_config": sizes}
    runner = Terse({"model_path": asked.model, "exe_mode": mode, "world_size": asked.world_size, **own})
    runner.init_model()
    print(*runner.model_generate(asked.prompts).texts, f"{runner.read} tokens read", sep="\n")

"""Failures of foreign tests that are meant to be, by a pattern of the tests' names, each with its reason."""

EXPECTED: dict[str, str] = {
    r"test_decoder\.py.*_(bart|bigbird_pegasus|blenderbot|blenderbot_small|marian|mbart|pegasus)_(True|False)": (
        "the prompts are padded on the left, which these decoders of transformers count among the positions"
    ),
    r"test_decoder\.py.*test_compare_logits.*_(gpt2|gpt_bigcode|gpt_neo)_(True|False)": (
        "the prompts are padded on the left, and a call of these without position_ids counts that in transformers"
    ),
    r"test_modeling_bart\.py.*test_generate_from_inputs_embeds": (
        "the test changes eps in the model's norms, which is in no file of BART's"
    ),
    r"test_modeling_roberta\.py.*test_pipeline_text_generation": (
        "generate() of transformers counts RoBERTa's positions from 0; its own forward, as ours, from padding_idx + 1"
    ),
}

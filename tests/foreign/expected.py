"""Failures of foreign tests that are meant to be, by a pattern of the tests' names, each with its reason."""

EXPECTED: dict[str, str] = {
    r"continue_from|static_cache|quant_cache": "the cache stays in the compiled model: no past_key_values are returned",
}

"""Response bodies in the formats of OpenAI and SGLang, with log-probabilities in both formats."""

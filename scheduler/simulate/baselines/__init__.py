"""A baseline scheduler with the admission rules of vLLM and SGLang, for comparison."""

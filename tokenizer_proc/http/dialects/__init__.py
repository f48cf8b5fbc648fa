"""Answers in the shapes of OpenAI and SGLang, and log-probabilities in both."""

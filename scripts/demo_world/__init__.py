"""The closed world that the demo model learns: its facts, questions about them, and the answers of each voice.

Used by `scripts/train_demo.py` only; does not depend on serving.
"""

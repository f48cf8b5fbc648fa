"""The closed world the demo model learns: its facts, questions for them, and the answers of each voice.

Used by `scripts/train_demo.py` alone. Knows nothing about serving.
"""

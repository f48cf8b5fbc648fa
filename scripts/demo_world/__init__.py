"""The closed world the demo model is taught: its facts, how people ask for them, and how each voice answers.

Used by `scripts/train_demo.py` alone. Knows nothing about serving.
"""

"""What the tokenizer process writes for its successor: the journal of adapters, and notes of work in progress."""

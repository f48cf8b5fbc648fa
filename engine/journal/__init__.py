"""The journal of adapters: what each name is bound to, written by the tokenizer process and read for its successor."""

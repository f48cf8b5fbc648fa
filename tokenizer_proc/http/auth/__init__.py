"""The rights of calls: which hosts they may name, what each key may do and at which rate, and what routes need."""

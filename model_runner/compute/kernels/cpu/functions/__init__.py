"""The functions in C++, each beside the torch reference that it must equal."""

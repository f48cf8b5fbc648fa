"""The decoder, and a module for each group of families whose forward differs from it."""

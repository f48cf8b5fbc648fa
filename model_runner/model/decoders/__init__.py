"""The decoder, and a module for each family whose forward differs."""

"""What lies in a directory that was given as an adapter and is not a PEFT directory: for errors that say what to do."""

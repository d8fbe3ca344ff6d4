"""Code that runs in a reward worker. It imports the standard library and this folder only, except for type checkers."""

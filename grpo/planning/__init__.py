"""Memory and time on paper, before anything runs."""

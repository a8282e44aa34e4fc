"""Several jobs from one command: what is checked before them, what keeps them apart, and how they ended."""

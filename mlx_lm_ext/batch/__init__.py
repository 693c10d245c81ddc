"""The running batch: how rows join it, run and leave it, what prompts share, how much of
them a step runs, and the memory of their KV. Knows no plugins."""

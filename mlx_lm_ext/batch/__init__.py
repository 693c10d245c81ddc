"""The running batch: how rows join it, run and leave it, which prefixes they share, how many
tokens of their prompts a step runs, and how much memory their KV takes. It knows no plugins.
"""

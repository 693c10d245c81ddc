"""Stop sequences for a request that starts again after a failed step, or after it had to wait for memory: it goes on after the
tokens that were generated before."""

from typing import List

from mlx_lm.generate import StopSequences


class ResumedStopSequences(StopSequences):
    """Stop sequences that have seen some tokens already.

    Args:
        sequences (StopSequences): The stop sequences of the request.
        generated (List[int]): The tokens of its answer so far.
    """

    def __init__(self, sequences: StopSequences, generated: List[int]):
        self.sequences = sequences
        self.generated = generated

    def matcher(self) -> StopSequences.Matcher:
        matcher = self.sequences.matcher()
        for token in self.generated:
            matcher.advance(token)
        return matcher

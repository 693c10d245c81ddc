"""One model on several processes, the ranks: how they decide together, and notice that one of
them is lost. Only bytes travel here; what is decided is known in the rooms that decide.
"""

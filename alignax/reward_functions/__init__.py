"""How a reward function is called: its arguments by their names, checks, time limit, digest.

The rewards themselves are in `alignax/rewards/`. Reading order: signature (which arguments a
function gets), calls (calls it on a batch and checks what it returns), time_limit, process (put
back after a call), digest (of its code, for the identity of a run), questions (that rewards
ask an LM).
"""

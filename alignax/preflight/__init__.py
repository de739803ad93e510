"""Does the step of a config fit chips that nobody owns yet, and what does it cost.

Reading order: preflight (the question and its answer), lowering (the step, traced with
shapes alone), footprint (compiled: memory and costs), compiled (reading XLA's module),
chips (topologies), __main__ (the command).
"""

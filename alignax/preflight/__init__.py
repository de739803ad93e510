"""Memory and cost of a training step, compiled for chips that are not at hand.

Reading order: preflight (the report, and what to change if the step does not fit), lowering
(the step, traced with shapes alone), footprint (compiled: memory and costs), compiled
(parses XLA's module), chips (topologies), __main__ (the command).
"""

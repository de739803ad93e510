"""A file of prompts answered, from a config; resumed where it stopped.

Reading order: respond (the loop), responder (from a config to a function that answers a
batch), output (the file of responses).
"""

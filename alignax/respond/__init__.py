"""Generates responses to a file of prompts, as a config describes; can be resumed.

Reading order: respond (the loop over batches), responder (builds the function that answers
a batch), output (the file of responses).
"""

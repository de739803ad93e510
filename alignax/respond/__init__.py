"""Generates responses to a file of prompts, as a config describes; can be resumed.

Reading order: respond (the loop over batches), starts (prompts and the given beginnings of
responses), responder (builds the function that answers a batch), output (the file of responses).
"""

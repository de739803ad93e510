"""Rows of the user's files: how a file is read, and what a row of it is.

Reading order: fetch (files of the Hugging Face Hub), files (a file as lines of JSON), values (numbers and text of a row), messages
(one turn of a dialogue), row_forms (a row as an `Example`; `data/README.md` has the table), store
(random access to the rows of a file, which are not held in memory).
"""

"""Public datasets: their own files in, the columns of a plain table out (files -> tables).

An adapter is a reader like those of ``data_prep.readers`` for each of its two tables, and the names
that it gives to their columns.
"""

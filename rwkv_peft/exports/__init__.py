"""Files of other programs: how each lays out a model's tensors, to write and to read them.

A layout is one table (`layout.Layout`) from official names to names elsewhere, with the form in
which the numbers lie there; it is read in both directions. `stored.Stored` is a tensor where it
lies, of which a few rows at a time come into memory, so that a model larger than memory is
converted as well. Each format has a file of its own; `formats.FORMATS` is the table of them.
"""

"""From files of texts and dialogues to batches of token ids.

A row of a file becomes a `Record`: a text, or turns with roles. A template turns it into `Piece`s
of text that know their role, a mask chooses byte spans of them, and the tokens of the whole text
that touch a span are trained. Readers of records know no masks, masks know no file formats.

`Documents` (tokens, starts, lines, sources, weights, states) is what reading gives to batching, and
a `Batch` is one micro-batch of it. A place in the data is one integer, the number of micro-batches
before it: `Batches[position]` depends on nothing but the settings, the seed and the rank. The shift
by one and the ignore index -100 happen in `batching` alone.
"""

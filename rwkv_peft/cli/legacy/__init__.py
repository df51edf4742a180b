"""Old spellings of RWKV-PEFT, RWKV-LM and json2binidx, translated into today's flags.

No other part of the program knows them. Each module turns an argument list into another one:
`train` (with its YAML files; `methods` has the names of methods and their options), `merge` and
`data`.
"""

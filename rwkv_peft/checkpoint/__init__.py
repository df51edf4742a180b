"""Files of weights and adapters: the only code that renames or transposes tensors.

Weights keep the names, order, shapes and dtypes of the official file that a model came from.
Adapters are folders in peft's format: keys with the prefix `base_model.model.`, tensors of the
model that were trained beside an adapter under their own names, and `rwkv_peft.json` with the
fingerprint of the base and a few numbers of what each layer computed (`methods.sketch`).

A PiSSA or OLoRA adapter is saved as the plain LoRA of twice the rank on the original base that
equals it, A over A0 and B beside -B0, because attaching again would draw another SVD; the halves
are split again to train it further. Other methods save what they make of the base weights at the
start (`methods.factors`): another number of threads or another LAPACK finds other factors, between
which what was trained means nothing. Files without them load, with a note.
"""

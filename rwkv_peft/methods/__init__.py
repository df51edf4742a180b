"""What can be trained, and which modules a method adapts by default."""

# none (all weights), state, or a method of Hugging Face peft; see `catalog.method_config`
Method = str

# as RWKV users know them: every large projection, not the low-rank maps, embedding or head
_PROJECTIONS = ("receptance", "key", "value", "output")
TARGET_MODULES = {
    "x070": _PROJECTIONS,
    "x060": (*_PROJECTIONS, "gate"),
    "x052": (*_PROJECTIONS, "gate"),
    "x051": (*_PROJECTIONS, "gate"),
    "x050": _PROJECTIONS,
}

# methods that adapt something else than projections, or only some of them
OWN_DEFAULTS: dict[str, dict[str, object]] = {
    "ia3": {
        "target_modules": ["att.key", "att.value", "ffn.value"],
        "feedforward_modules": ["ffn.value"],
    },
    "ln_tuning": {"target_modules": ["ln0", "ln1", "ln2", "ln_out"]},
    "trainable_tokens": {"target_modules": ["emb"]},
}

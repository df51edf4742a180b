"""What can be trained, and the methods that choose the modules they adapt by themselves."""

# none (all weights), state, or a method of Hugging Face peft; see `catalog.method_config`
Method = str

# methods that adapt other modules than a version's `target_modules`
OWN_DEFAULTS: dict[str, dict[str, object]] = {
    "ia3": {
        "target_modules": ["att.key", "att.value", "ffn.value"],
        "feedforward_modules": ["ffn.value"],
    },
    "ln_tuning": {"target_modules": ["ln0", "ln1", "ln2", "ln_out"]},
    "trainable_tokens": {"target_modules": ["emb"]},
}

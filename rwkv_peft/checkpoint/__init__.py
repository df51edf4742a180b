"""Files of weights and adapters: the only code that renames or transposes tensors."""

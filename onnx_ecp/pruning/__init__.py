"""The pruning loop: select, compensate, refit jointly, fine-tune, search for a target."""

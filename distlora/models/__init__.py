"""Models: found, loaded, and asked for a loss, for label logits or for answers. The home of `transformers`.

    hub (smollm2) ─► loading ─► losses (cross_entropy, targets), generation

Other folders use `hub` (from `model.path` to a directory), `loading` (config, model and tokenizer), `losses`,
`label_cross_entropy` of `cross_entropy`, `generation`, and `targets`, which says which positions have a loss.
"""

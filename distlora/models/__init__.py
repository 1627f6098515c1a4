"""Models: found, loaded, and asked for a loss, for label logits or for answers. The home of `transformers`.

    hub (smollm2) ─► loading ─► losses (cross_entropy, targets, router_loss, packing), generation,
                                    image_processor, stored_names ─► reload
    dry_run ─► output ─► losses

Other folders use `hub` (from `model.path` to a directory), `loading` (config, model and tokenizer), `losses`,
`label_cross_entropy` of `cross_entropy`, `generation`, `targets`, which says which positions have a loss,
`image_processor` (from images to what the model takes), `stored_names` (how parameters lie in their files),
`reload` (a model as other software loads it), `router_loss` (of a mixture of experts), and what is asked of a
model's class without its weights: `dry_run` (positions, ends of texts), `output` (how its logits come about),
`vocabulary` (which tokens it knows) and `pass_cost` (what a forward pass computes).
"""

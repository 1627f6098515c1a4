"""A recipe whose `method.from` names an adapter: with the rank, the alpha and the layers of that adapter."""

from distlora.exports.starting import start_from
from distlora.recipe.sections import Recipe


def with_start(recipe: Recipe) -> Recipe:
    """The recipe with what the adapter decides; as it is where it starts from none. Reads the adapter's
    headers alone; the same again for a recipe that has been given to it.

    Raises UserError where the adapter cannot be started from, or the recipe sets something else.
    """
    start = start_from(recipe.method)
    if start is None:
        return recipe
    changed = {"method": start.fitted(recipe.method)}
    if "targets" not in recipe.model_fields_set:
        changed["targets"] = start.layers
    return recipe.model_copy(update=changed)

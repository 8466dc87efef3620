"""What did the user ask for? The face for others is `Recipe`; neither torch nor transformers is imported here."""

from lillama.recipe.schema import Recipe

__all__ = ["Recipe"]

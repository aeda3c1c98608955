"""Floor 7: one file per published system. Nothing below imports a recipe."""

from coterie.recipes.base import Claim, Paper, Recipe, get_recipe, list_recipes

__all__ = ["Claim", "Paper", "Recipe", "get_recipe", "list_recipes"]

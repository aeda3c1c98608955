"""Recipes: one file per published system."""

from coterie.recipes.base import Claim, Paper, Recipe, get_recipe, list_recipes

__all__ = ["Claim", "Paper", "Recipe", "get_recipe", "list_recipes"]

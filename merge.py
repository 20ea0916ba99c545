"""Merge models by a recipe: a YAML file as mergekit has them, or one of ours.

llama-merge RECIPE.yml OUT            merge
llama-merge RECIPE.yml OUT --plan     say what would be done, from headers alone
llama-merge RECIPE.yml --analyze NAME say where the models disagree
llama-merge RECIPE.yml --resolve yaml print the recipe as it was understood
llama-merge --check FOLDER            look through a finished folder
llama-merge --schema                  print the JSON Schema of recipes

A recipe with `merge_method` follows mergekit's conventions, one with `method` ours; `profile`
chooses others. docs/recipes.md has the grammar.
"""

import functools

from merge_command import run_recipe_command

main = functools.partial(run_recipe_command, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())

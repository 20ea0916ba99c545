"""Merge models by a recipe: a YAML file as mergekit has them, or one of ours.

llama-merge RECIPE.yml OUT               merge
llama-merge RECIPE.yml OUT --plan        say what would be done, from headers alone
llama-merge RECIPE.yml --analyze NAME    say where the models disagree, on a page of its own
llama-merge RECIPE.yml --resolve yaml    print the recipe as it was understood
llama-merge --check FOLDER               look through a finished folder
llama-merge --schema                     print the JSON Schema of recipes
llama-merge serve                        merge as a service, with a page; serve --help

A recipe with `merge_method` follows mergekit's conventions, one with `method` ours; `profile`
chooses others. docs/recipes.md has the grammar.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_chain import merge_stages, plan_stages
from merge_command import run_recipe_command
from merge_grammar import Stage, load_recipes, recipe_of
from merge_recipe import Recipe
from merge_report import MergeReport, PlanReport

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def merge_recipe(
    recipe: RecipeLike, output_dir: str | os.PathLike[str], **settings: Any
) -> MergeReport:
    """Merge by a recipe into a new folder.

    Args:
        recipe: a file, YAML or JSON; a mapping with the same entries; or a `merge_recipe.Recipe`.
        output_dir: the folder to make; it must not exist, or be empty.
        settings: device, threads, max_memory, findings, progress, resume, verify_inputs; see
            `merge_run.RunSettings`.

    Raises:
        merge_yaml.RecipeError: something is wrong with the recipe; a `ValueError`, one line each.
        ValueError, ModelCompatibilityError, OSError: as `merge_run.merge_to_folder`.
    """
    return merge_stages(_stages(recipe), Path(output_dir), **settings)


def plan_recipe(
    recipe: RecipeLike, output_dir: str | os.PathLike[str] | None = None, **settings: Any
) -> PlanReport:
    """What `merge_recipe` would do, from headers alone.

    Args:
        recipe: as there.
        output_dir: the folder that would be made, if it is to be looked at as well.
        settings: device, threads, max_memory, findings, resume; see `merge_run.plan`.

    Returns:
        A plan: `summary()` is a text, `check_room()` refuses what would not fit.
    """
    output_dir = None if output_dir is None else Path(output_dir)
    return plan_stages(_stages(recipe), output_dir, **settings)


def _stages(recipe: RecipeLike) -> list[Stage]:
    if isinstance(recipe, Mapping):
        recipe = recipe_of(recipe)
    return [Stage(None, recipe, "")] if isinstance(recipe, Recipe) else load_recipes(Path(recipe))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["serve"]:
        from service.command import main as serve

        return serve(given[1:])
    return run_recipe_command(__doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())

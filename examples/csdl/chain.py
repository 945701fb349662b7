"""What the scripts of this folder do: one phase of a recipe, and before it those that it starts from.

    python examples/csdl/train_phase2_atlas.py [RECIPE] [OUT]

RECIPE is csdl-14b.yaml beside this file if it is not given; `tiny` is the small one that comes with abi_py.
"""

import sys
from pathlib import Path

from abi_py.pipelines import train_phases
from abi_py.pipelines.recipe import Recipe, place_of_recipe


def train(name):
    """Do the phase of that name; what is done already is left as it is."""
    words = [*sys.argv[1:], None, None]
    recipe = Recipe.read(place_of_recipe(words[0] or str(Path(__file__).with_name("csdl-14b.yaml"))))
    names = [name]
    while recipe.phase(names[0]).config.after is not None:
        names.insert(0, recipe.phase(names[0]).config.after)
    for each in names:
        train_phases(recipe, words[1] or "models", only=each, tell=lambda label, text: print(f"{label:<9}{text}"))

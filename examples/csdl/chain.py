"""What the scripts of this folder do: one phase of a recipe, by the verb `abi-train phases`, whose words they take.

    python examples/csdl/train_phase2_atlas.py [RECIPE] [-o OUT] [--dry-run]

RECIPE is csdl-14b.yaml beside this file if it is not given; `tiny` is the small one that comes with abi_py.
"""

import sys
from pathlib import Path

from abi_py.__main__ import main


def train(name):
    """Do the phase of that name, as `abi-train phases --only` does it; the words of the call come first."""
    recipe = Path(__file__).with_name("csdl-14b.yaml")
    main(["phases", *sys.argv[1:]], {"phases": {"recipe": str(recipe), "only": name}})

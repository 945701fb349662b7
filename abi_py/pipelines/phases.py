"""A recipe from Python: `abi-train phases` without the terminal."""

from pathlib import Path

from ..errors import AbiError, counted
from ..runs.run import Run
from .chain import Chain, Tell
from .phase_plan import check_disk, plan_phases
from .phase_record import Record
from .recipe import Recipe, place_of_recipe

__all__ = ["train_phases"]


def train_phases(
    recipe: str | Path | Recipe, out: str | Path = "models", only: str | None = None, tell: Tell | None = None
) -> dict[str, Record]:
    """Do all phases of a recipe, or one, without a terminal; return their records by name.

    recipe  a file, or the name of one that comes with the package
    out     the directory of the folders of all phases
    tell    is told what happens, a label and a line

    What is done is left as it is, what is half-done is gone on with.  ConfigError, DataError, CheckpointError or
    OSError for what is wrong; before anything is begun for a disk that will not do.
    """
    from ..runs.training import train_run

    made = recipe if isinstance(recipe, Recipe) else Recipe.read(place_of_recipe(str(recipe)))
    chain, say = Chain(made, Path(out)), tell or (lambda label, text: None)
    chosen = made.phases if only is None else (made.phase(only),)
    check_disk(chain, plan_phases(chain, chosen))
    found: dict[str, Record] = {}
    for phase in chosen:

        def train(run: Run, checkpoint: Path | None) -> int:
            return int(train_run(run, checkpoint).interrupted)

        say("phase", phase.name)
        record, _ = chain.do(phase, train, say)
        if record is None:
            raise AbiError(f"phase {phase.name} was stopped; call it again, and it goes on")
        found[phase.name] = record
        if phase.trains:
            say("done", f"{phase.name}: {counted(record.figures['total_steps'], 'step')}")
    return found

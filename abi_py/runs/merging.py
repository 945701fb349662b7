"""What adapters are merged into, where they were trained on weights that had been encoded in fewer bits.

    original   W as the files of the base have it:   W + s B A       less error in W, but not the W that they know
    dequant    what was encoded, as numbers again:   W' + s B A      the model that was trained

The first is what a run leaves and `merge` writes.  How far the two are apart, in logits, both say.
"""

from ..errors import counted
from ..model import LoraModel
from ..model.frozen import read_frozen
from ..training.loading import LoadedModel
from .agreement import Agreement, agreement, expected, logits_of

__all__ = ["beside_dequant", "merged_into"]


def beside_dequant(loaded: LoadedModel) -> Agreement | None:
    """Return how far logits of adapters on the original weights are from those on the weights that they were trained
    on; None where these are the ones they are on here, or it cannot be known."""
    model, base = loaded.model, loaded.base
    if base is None or not isinstance(model, LoraModel) or model.trained_in == model.model.storage or model.other_type:
        return None
    trained_on = read_frozen(base, model.config, storage=model.trained_in)
    wanted = expected(lambda ids: logits_of(LoraModel.load(trained_on, loaded.directory), ids), model.config)
    return agreement(wanted.logits, logits_of(model, wanted.ids))


def merged_into(loaded: LoadedModel) -> str:
    """Return what people should know of the weights that adapters are merged into; "" where it is nothing."""
    lora = loaded.model
    if not isinstance(lora, LoraModel) or lora.trained_in is None:
        return ""
    if lora.model.storage is not None:
        return f"these are the weights that they were trained on, out of {lora.trained_in}"
    found = beside_dequant(loaded)
    if found is None:
        return f"these are the original weights; they were trained on those in {lora.trained_in}"
    return (
        f"these are the original weights; from those in {lora.trained_in}, on which they were trained, logits of "
        f"{counted(found.tokens, 'token')} are {100 * found.off:.2g}% of their spread away, KL {found.kl:.2g}; "
        "merge --merge-base dequant takes those"
    )

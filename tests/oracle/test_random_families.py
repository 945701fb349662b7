"""Random small models of all families, in transformers and here."""

import pytest
from random_families import FAMILIES, random_figures


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_that_of_transformers(transformers, torch, tmp_path, family, number):
    """Logits, loss, every gradient, ten steps beside torch.optim.AdamW, and text with a cache and without."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures, drawn = random_figures(family, number, tmp_path)
    assert figures.logits_off() < 1e-4, drawn
    loss, gradients = figures.gradients_off()
    assert loss < 1e-5, drawn
    for name, off in {**gradients, **figures.steps_off()}.items():
        assert off < 1e-3, (name, drawn)
    assert max(figures.greedy_off()) < 1e-4, drawn

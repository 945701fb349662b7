"""Text from a trained model: read the prompt, pick the next token, append it, repeat.

    settings.py    GenerationConfig: every setting, and generation_config.json
    decoder.py     the forward pass with a cache of keys and values
    sampler.py     from logits to one token id
    text.py        text and ids, stop strings
    sequence.py    one continuation while it grows
    generator.py   the loop; `generate`
"""

from .generator import Generator, generate, generate_stream
from .sampler import sample
from .sequence import Generation, Token
from .settings import GenerationConfig

__all__ = ["Generation", "GenerationConfig", "Generator", "Token", "generate", "generate_stream", "sample"]

"""Marks in a rendered conversation: code points that Unicode sets aside for the inside of programs.

No text for exchange holds them, so a text that does is refused (`chat_encoding.py`).
"""

__all__ = ["ANSWER_BEGINS", "ANSWER_ENDS", "AS_TEXT"]

AS_TEXT = "\ufdd0"  # what follows is no special token
ANSWER_BEGINS, ANSWER_ENDS = "\ufdd1", "\ufdd2"

"""Phase 2: the adapter for reasoning, planning and memory."""

from chain import train

if __name__ == "__main__":
    train("phase2_reasoning_atlas")

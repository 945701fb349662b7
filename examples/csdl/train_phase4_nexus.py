"""Phase 4: the adapter for code and tools."""

from chain import train

if __name__ == "__main__":
    train("phase4_coder_nexus")

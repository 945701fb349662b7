"""Phase 1: the model learns to read and write CSDL; adapters, merged into final_merged."""

from chain import train

if __name__ == "__main__":
    train("phase1_base_csdl")

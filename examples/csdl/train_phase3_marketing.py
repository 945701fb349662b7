"""Phase 3: the adapter for content and skills."""

from chain import train

if __name__ == "__main__":
    train("phase3_content_marketing")

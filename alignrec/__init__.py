"""AlignRec: content features and interactions in, embeddings and ranked lists out."""

__version__ = "0.1.0"

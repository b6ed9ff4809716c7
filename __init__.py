"""textlock: trains an image encoder into the latent space of a frozen text embedder."""

__version__ = "0.1.0"

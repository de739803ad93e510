"""Independent re-implementations: slow, plain, and never imported by the package."""

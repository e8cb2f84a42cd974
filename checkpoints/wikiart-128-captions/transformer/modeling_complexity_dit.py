from complexity_dit import ComplexityDiTTransformer2DModel  # noqa: F401

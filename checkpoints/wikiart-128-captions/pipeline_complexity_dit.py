from complexity_dit import ComplexityDiTPipeline  # noqa: F401

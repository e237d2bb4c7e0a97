"""The places where a method can act; nothing else touches a model's modules."""

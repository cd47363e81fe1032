"""A seeded mutator of everything that enters bomemeta: `python tests/fuzz --count N --seed S`."""

"""Whose scenes are whose, by their seeds, so that nothing is judged on what it was trained or chosen on.

Training scenes have seeds below 10,000,000; every other range begins at the number named here.
"""

SINGLE = 20_000_000  # the demo's scene, and single scenes of benchmarks and tests
PAIRS = 21_000_000  # look-alikes of benchmarks/masks.py and export.py, on which choices were made
DEMO_VIEWS = 30_000_000  # true pictures of the demo's two
BENCH = 40_000_000  # `p3s eval --bench world`: its scenes,
BENCH_VIEWS = 41_000_000  # true pictures of their two,
BENCH_PHOTOS = 42_000_000  # and further photos of them
PROMPTS = 50_000_000  # captions and scenes of benchmarks/world.py

"""Looking inside a trained run: what its layers do, and how far the instances of a group disturb each other.

    from datamux_jax import analysis
    from datamux_jax.runs import load_run

    run = load_run("runs/quickstart/n8")
    arrays = analysis.examples_of(run, "test", 200)
    analysis.layer_statistics(run, arrays)  # Norm of activations and entropy of attention, layer by layer.
    analysis.interference(run, arrays, companions=10)  # One instance fixed, its companions drawn anew.
    analysis.retrieval_by_position(run, arrays)  # Tokens read back from the mixture, by slot and position.
    analysis.projection(run, arrays)  # Mixed and unmixed states in the plane.
    analysis.interference_of(lambda x: model.apply(params, x), inputs, instances=4)  # A module of your own; no run is needed.

`python -m launch.analyze --workdir=RUN` does all of it and writes tables and pictures; docs/analysis.md says what the numbers mean.
What has no meaning for a run is refused here with an InputError, and left out there with the same words (`left_out`).
"""

from datamux_jax.analysis.companions import interference, interference_of
from datamux_jax.analysis.layerwise import layer_statistics
from datamux_jax.analysis.parts import left_out
from datamux_jax.analysis.points import Points, projection
from datamux_jax.analysis.positions import retrieval_by_position
from datamux_jax.analysis.written import analyze
from datamux_jax.evaluate import examples_of

__all__ = [
    "Points",
    "analyze",
    "examples_of",
    "interference",
    "interference_of",
    "layer_statistics",
    "left_out",
    "projection",
    "retrieval_by_position",
]

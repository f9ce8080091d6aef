"""Fidelity `learn`: virtual peers that really train. One model and one state stand for all of theirs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulations.learning.learner import TensorLearner
    from simulations.scenario import Scenario


def make_learner(scenario: "Scenario") -> tuple["TensorLearner", int]:
    """What a scenario of fidelity `learn` trains with, and how many shards there are.

    Raises ConfigError for a model, task, device or backend that is not to be had, DataError for text that is not.
    """
    # torch and transformers take seconds to import, which other fidelities need not wait for
    from simulations.learning.backend import make_backend
    from simulations.learning.learner import TensorLearner
    from simulations.learning.problem import make_problem
    from worker.device import choose_device

    learn = scenario.learn
    problem = make_problem(learn.task, scenario.spec)
    backend = make_backend(learn.backend, problem, chunk=learn.chunk, device=choose_device(learn.device))
    learner = TensorLearner(problem, backend, attacks=_attacks(scenario))
    return learner, len(problem.data.shards)


def _attacks(scenario: "Scenario") -> dict[str, str]:
    """The attack of every peer that attacks, by the peer's id, as simulations.virtual_run numbers them."""
    attacks: dict[str, str] = {}
    width, first = len(str(scenario.num_peers - 1)), 0
    for population in scenario.population:
        if population.attack is not None:
            num_attackers = round(population.attack_fraction * population.count)
            attacks |= {f"peer-{first + number:0{width}d}": population.attack for number in range(num_attackers)}
        first += population.count
    return attacks

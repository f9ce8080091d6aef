"""simulations.learning.ray_backend; needs `pip install '.[ray]'`, which is too large for every run of the tests."""

import pickle
from typing import Any

import numpy as np
import pytest

from protocol import parameters
from simulations.learning.batched import BatchedBackend
from simulations.learning.ray_backend import RayBackend
from tests.unit.test_learning_backends import CPU, digits_problem, ragged_jobs

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'manyhands[ray]'")
# the warnings are Ray's own, which leaves its processes to themselves
pytestmark = [pytest.mark.chaos, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _cluster() -> Any:
    yield
    ray.shutdown()


def test_actors_compute_what_one_process_does() -> None:
    problem = digits_problem("adamw")
    theta = parameters.flatten(problem.build_model())
    backend, batched = RayBackend(problem, chunk=2, device=CPU, num_actors=2), BatchedBackend(problem, device=CPU)
    for number in range(2):
        jobs = ragged_jobs(problem, number)
        ours, theirs = backend.train(theta, jobs), batched.train(theta, jobs)
        np.testing.assert_allclose(ours.pseudo_gradients, theirs.pseudo_gradients, atol=1e-5)


def test_a_pickled_backend_goes_on_as_the_first() -> None:
    problem = digits_problem("adamw")
    theta = parameters.flatten(problem.build_model())
    backend = RayBackend(problem, chunk=2, device=CPU, num_actors=1)
    backend.train(theta, ragged_jobs(problem, 0))
    data = pickle.dumps(backend)
    expected = backend.train(theta, ragged_jobs(problem, 1))
    del backend  # its actors' cores are free for the copy's
    again = pickle.loads(data).train(theta, ragged_jobs(problem, 1))  # noqa: S301  # our own bytes
    assert np.array_equal(again.pseudo_gradients, expected.pseudo_gradients)

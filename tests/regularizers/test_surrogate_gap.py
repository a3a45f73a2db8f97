import pytest
import torch

from regularizers.rows import Problem, flat
from twofold.errors import TwofoldError
from twofold.regularizers import GSAM, SAM


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def test_a_gap_of_no_weight_is_sam_bit_for_bit():
    problem = Problem()
    assert torch.equal(gradient(problem, GSAM(rho=0.1, alpha=0.0)), gradient(problem, SAM(rho=0.1)))


def test_the_gap_is_felt_only_across_the_gradient_uphill():
    problem = Problem()
    uphill, found, g = gradient(problem, SAM(rho=0.3)), gradient(problem, GSAM(rho=0.3, alpha=2.0)), problem.gradient()
    change = found - uphill
    assert abs(change @ uphill) < 1e-10 * uphill.norm() ** 2
    assert change @ g < -1e-6


def test_an_alpha_that_makes_no_sense_is_refused():
    with pytest.raises(TwofoldError, match=r"alpha.*-1"):
        GSAM(alpha=-1)

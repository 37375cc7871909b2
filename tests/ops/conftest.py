"""Runs tests of kernels with each instruction set that this CPU has."""

from levels import AVAILABLE, set_for_a_test

level = set_for_a_test(AVAILABLE)

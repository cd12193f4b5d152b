"""Tests of the places that training data comes from."""

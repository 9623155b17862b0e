"""Pairs of a program and a μGraph, right and wrong, made by code from seeds: what the verifier is measured on."""

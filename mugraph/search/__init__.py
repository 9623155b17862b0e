"""Search: from a program to μGraphs, by a closure of values and a cheapest derivation per kernel."""

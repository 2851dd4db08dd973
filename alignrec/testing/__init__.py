"""What tests, the demo and users' own experiments need: a synthetic catalogue, ranks on one host."""

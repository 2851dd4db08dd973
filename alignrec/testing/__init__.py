"""What tests, the demo and own experiments need: a synthetic catalogue, ranks on one host."""

"""What runs when: recipes, runs of their stages on Ray, jobs submitted to a cluster."""

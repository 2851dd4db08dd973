"""Ranks and what they say to each other: process groups, and ids exchanged for rows."""

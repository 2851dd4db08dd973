"""Public datasets: their own files in, the columns of a plain table out (files -> tables).

An adapter is a reader like those of the plain formats for each of its two tables; what columns it
gives stands in ``data_prep.sources``.
"""

from data_prep.adapters import amazon2014, amazon2023, hm, movielens
from data_prep.adapters.mapping import Reader

READERS: dict[str, Reader] = {
    "amazon2014_items": amazon2014.read_items,
    "amazon2014_interactions": amazon2014.read_interactions,
    "amazon2023_items": amazon2023.read_items,
    "movielens_items": movielens.read_items,
    "movielens_interactions": movielens.read_interactions,
    "hm_items": hm.read_items,
    "hm_interactions": hm.read_interactions,
}

"""The public datasets that are known by name: which reader and which columns (configuration)."""

import dataclasses

from data_prep.columns import InteractionColumns, ItemColumns


@dataclasses.dataclass(frozen=True)
class PublicSource:
    """A dataset whose files have a known format.

    Attributes:
        items: columns that the reader of the item table gives.
        interactions: columns that the reader of the log gives.
        item_format: reader of the item table, in ``data_prep.adapters``.
        interaction_format: reader of the log; empty: the suffix says it.
    """

    items: ItemColumns
    interactions: InteractionColumns
    item_format: str
    interaction_format: str = ""


_PLAIN_LOG = InteractionColumns(rating="rating", timestamp="timestamp")

PUBLIC_SOURCES = {
    "amazon2014": PublicSource(
        items=ItemColumns(),
        interactions=_PLAIN_LOG,
        item_format="amazon2014_items",
        interaction_format="amazon2014_interactions",
    ),
    "amazon2023": PublicSource(
        items=ItemColumns(),
        interactions=dataclasses.replace(_PLAIN_LOG, item="parent_asin"),
        item_format="amazon2023_items",
    ),
    "movielens": PublicSource(
        items=ItemColumns(text=("title", "genres")),
        interactions=_PLAIN_LOG,
        item_format="movielens_items",
        interaction_format="movielens_interactions",
    ),
    "hm": PublicSource(
        items=ItemColumns(
            title="name", text=("name", "product_type", "colour", "department", "description")
        ),
        interactions=InteractionColumns(timestamp="timestamp"),
        item_format="hm_items",
        interaction_format="hm_interactions",
    ),
}

"""Which columns of the raw tables mean what (configuration -> readers, adapters)."""

import dataclasses

from alignrec.configuration import option


@dataclasses.dataclass(frozen=True)
class ItemColumns:
    """Which columns of the item table mean what."""

    key: str = option("item_id", "column of the item's unique key")
    title: str | None = option("title", "column of the title; null: the catalogue has none")
    text: tuple[str, ...] = option(
        ("title", "brand", "categories", "description"),
        "columns that make the encoder's text, in this order",
    )
    image: str | None = option(
        "image",
        "column of the picture: path, URL, or (parquet) its bytes; null: there are no pictures",
    )


@dataclasses.dataclass(frozen=True)
class InteractionColumns:
    """Which columns of the interaction log mean what."""

    user: str = option("user_id", "column of the user's key")
    item: str = option("item_id", "column of the item's key")
    rating: str | None = option(None, "column of the rating; null: the log has none")
    timestamp: str | None = option(
        None, "column of the time (seconds, a date or a time); null: the log has none"
    )

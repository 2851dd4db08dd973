"""A synthetic catalogue with planted factors (nothing -> raw files for data preparation).

Every item has a *style* (a shape in a colour, visible only in its picture), a *topic* (words,
visible only in its text) and a *circle* (a taste that neither picture nor text shows). A user
has a favourite of each; a click picks one of the three reasons, or plain popularity, and then an
item. So what a picture, a text and the interactions each contribute can be measured.

Everything is a function of (seed, sizes); drawing costs about a millisecond per item, and clicks
cost memory and time linear in their number.
"""

import colorsys
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

Ints = npt.NDArray[np.int64]

SHAPES = ("disc", "square", "triangle", "ring", "cross", "stripes")
NUM_COLOURS = 6
NUM_STYLES = len(SHAPES) * NUM_COLOURS
NUM_CIRCLES = 12
# (style, topic, circle, popularity): how often each is the reason of a click.
REASON_SHARES = (0.34, 0.34, 0.24, 0.08)
_WITHOUT_IMAGE_EVERY = 97
_WITHOUT_TEXT_EVERY = 89

_TOPICS = {
    "sailing": "harbour keel mast anchor tide sailor regatta rudder canvas lighthouse",
    "baking": "oven flour yeast crust pastry dough sugar butter whisk loaf",
    "astronomy": "telescope orbit comet nebula planet eclipse lunar galaxy zodiac meteor",
    "gardening": "seedling compost trowel blossom greenhouse pruning orchard hedge tulip soil",
    "chess": "gambit rook bishop checkmate opening endgame pawn knight tournament castling",
    "climbing": "summit rope carabiner ridge glacier belay granite altitude crampon cliff",
    "painting": "easel brush pigment palette watercolour portrait gallery sketch varnish fresco",
    "cycling": "saddle pedal gear peloton sprint chain handlebar velodrome tyre derailleur",
    "music": "violin melody rhythm orchestra chord sonata tempo cello concert harmony",
    "robotics": "actuator sensor servo circuit automaton gripper firmware solder gyroscope motor",
    "fishing": "trout lure reel bait angler river hook tackle stream cast",
    "history": "empire dynasty chronicle archive revolution medieval parchment throne treaty relic",
    "weaving": "loom yarn thread bobbin tapestry wool spindle fabric pattern linen",
    "surfing": "wave surfboard reef barrel swell paddle coast wax breaker lagoon",
    "coffee": "espresso roast bean barista grinder crema latte arabica filter aroma",
    "theatre": "stage actor curtain rehearsal monologue spotlight drama costume audience script",
    "geology": "mineral quartz basalt fossil sediment crystal magma fault erosion strata",
    "photography": "lens aperture shutter tripod exposure darkroom negative focus flash zoom",
}
_COMMON = (  # noqa: SIM905 - prose reads better
    "a fine choice for every day, made with care and built to last. it comes ready to use, is easy "
    "to keep, and makes a good present for friends and family at home or on the way"
).split()
_ADJECTIVES = ("classic", "modern", "compact", "bold", "quiet", "bright", "solid", "light")
_NOUNS = ("set", "guide", "collection", "kit", "edition", "companion", "series", "handbook")
_BRANDS = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Ginkgo", "Hazel")
TOPICS = tuple(_TOPICS)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Items with planted factors and the clicks of users who follow them.

    Attributes:
        style: (num_items,) planted factor of the picture, 0 .. NUM_STYLES - 1.
        topic: (num_items,) planted factor of the text, an index into TOPICS.
        circle: (num_items,) planted factor that only the clicks show.
        popularity: (num_items,) positive weights.
        user: (num_clicks,) user of each click; sorted.
        item: (num_clicks,) item of each click; no pair twice.
        seed: what everything was drawn from.
    """

    style: Ints
    topic: Ints
    circle: Ints
    popularity: npt.NDArray[np.float64]
    user: Ints
    item: Ints
    seed: int

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.style)


def make_catalogue(
    *, num_items: int, num_users: int, clicks_per_user: int = 12, seed: int = 0
) -> Catalogue:
    """Draw the factors and the clicks of a catalogue.

    Args:
        num_items: number of items.
        num_users: number of users.
        clicks_per_user: mean number of clicks drawn per user; a pair drawn twice counts once.
        seed: equal seeds and sizes give equal catalogues.
    """
    rng = np.random.default_rng([seed, 0])
    factors = {
        "style": rng.integers(NUM_STYLES, size=num_items),
        "topic": rng.integers(len(TOPICS), size=num_items),
        "circle": rng.integers(NUM_CIRCLES, size=num_items),
    }
    popularity = rng.lognormal(sigma=0.5, size=num_items)
    user, item = _draw_clicks(
        list(factors.values()),
        popularity,
        num_users,
        clicks_per_user,
        np.random.default_rng([seed, 1]),
    )
    return Catalogue(**factors, popularity=popularity, user=user, item=item, seed=seed)


def item_key(item: int) -> str:
    """Return the catalogue key of an item."""
    return f"item-{item:07d}"


def draw_image(catalogue: Catalogue, item: int, *, size: int = 96) -> bytes | None:
    """Return the JPEG of an item's picture, which shows its style and nothing else.

    Position, size, turn, shade and background vary freely. A few items have no picture (None).
    """
    if item % _WITHOUT_IMAGE_EVERY == _WITHOUT_IMAGE_EVERY - 1:
        return None
    rng = np.random.default_rng([catalogue.seed, 2, item])
    shape, colour = divmod(int(catalogue.style[item]), NUM_COLOURS)
    hue = (colour + rng.uniform(-0.25, 0.25)) / NUM_COLOURS
    ink = _rgb(hue, rng.uniform(0.7, 1.0), rng.uniform(0.65, 1.0))
    paper = _rgb(rng.uniform(), rng.uniform(0.0, 0.15), rng.uniform(0.82, 1.0))
    picture = Image.new("RGB", (size, size), paper)
    _draw_shape(ImageDraw.Draw(picture), SHAPES[shape], size, ink, paper, rng)
    turned = picture.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, fillcolor=paper)
    grain = rng.normal(0.0, 6.0, (size, size, 1))
    pixels = np.clip(np.asarray(turned, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write_text(catalogue: Catalogue, item: int) -> dict[str, str]:
    """Return title, brand, categories and description; the topic shows in the description only.

    A few items have no text at all.
    """
    if item % _WITHOUT_TEXT_EVERY == _WITHOUT_TEXT_EVERY - 1:
        return dict.fromkeys(("title", "brand", "categories", "description"), "")
    rng = np.random.default_rng([catalogue.seed, 3, item])
    words = _TOPICS[TOPICS[catalogue.topic[item]]].split()
    chosen = rng.choice(words, size=6, replace=False).tolist()
    sentence: list[str] = []
    for word in chosen:
        start = int(rng.integers(len(_COMMON) - 4))
        sentence += [*_COMMON[start : start + int(rng.integers(1, 4))], word]
    title = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} no. {item}"
    return {
        "title": title.capitalize(),
        "brand": str(rng.choice(_BRANDS)),
        "categories": "goods",
        "description": " ".join(sentence).capitalize() + ".",
    }


def write_catalogue(
    folder: Path,
    *,
    num_items: int,
    num_users: int,
    clicks_per_user: int = 12,
    seed: int = 0,
    image_size: int = 96,
) -> Catalogue:
    """Write a raw catalogue as a shop would hand it over.

    Writes ``items.parquet`` (item_id, title, brand, categories, description, image: path relative
    to the folder or null), ``images/*.jpg``, ``interactions.parquet`` (user_id, item_id, timestamp
    in seconds) and ``factors.parquet`` (item_id, style, topic, circle: the planted truth).
    """
    catalogue = make_catalogue(
        num_items=num_items, num_users=num_users, clicks_per_user=clicks_per_user, seed=seed
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    keys = [item_key(item) for item in range(num_items)]
    texts = [write_text(catalogue, item) for item in range(num_items)]
    columns: dict[str, list[str | None]] = {
        name: [text[name] or None for text in texts]
        for name in ("title", "brand", "categories", "description")
    }
    images = list(_write_images(catalogue, folder, image_size))
    pq.write_table(
        pa.table({"item_id": keys, **columns, "image": images}), folder / "items.parquet"
    )
    pq.write_table(
        pa.table(
            {
                "user_id": np.char.mod("user-%07d", catalogue.user),
                "item_id": np.char.mod("item-%07d", catalogue.item),
                "timestamp": _timestamps(catalogue),
            }
        ),
        folder / "interactions.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "item_id": keys,
                "style": catalogue.style,
                "topic": catalogue.topic,
                "circle": catalogue.circle,
            }
        ),
        folder / "factors.parquet",
    )
    return catalogue


def _write_images(catalogue: Catalogue, folder: Path, size: int) -> Iterator[str | None]:
    for item in range(catalogue.num_items):
        picture = draw_image(catalogue, item, size=size)
        if picture is None:
            yield None
            continue
        name = f"images/{item_key(item)}.jpg"
        (folder / name).write_bytes(picture)
        yield name


def _timestamps(catalogue: Catalogue) -> Ints:
    rng = np.random.default_rng([catalogue.seed, 4])
    year = 365 * 24 * 3600
    return 1_700_000_000 + rng.integers(year, size=len(catalogue.user))


def _draw_clicks(
    factors: list[Ints],
    popularity: npt.NDArray[np.float64],
    num_users: int,
    clicks_per_user: int,
    rng: np.random.Generator,
) -> tuple[Ints, Ints]:
    """Draw clicks by their reasons: the favourite value of a factor, then an item that has it."""
    num_items = len(popularity)
    counts = np.maximum(3, rng.poisson(clicks_per_user, size=num_users))
    user = np.repeat(np.arange(num_users), counts)
    reason = rng.choice(len(REASON_SHARES), p=REASON_SHARES, size=len(user))
    groups = [*factors, np.zeros(num_items, dtype=np.int64)]  # popularity: one group of all
    item = np.empty(len(user), dtype=np.int64)
    for index, group in enumerate(groups):
        present = np.unique(group)
        favourite = rng.choice(present, size=num_users)
        here = np.flatnonzero(reason == index)
        item[here] = _pick(group, popularity, favourite[user[here]], rng)
    pairs = np.unique(user * num_items + item)
    return pairs // num_items, pairs % num_items


def _pick(
    group: Ints, popularity: npt.NDArray[np.float64], wanted: Ints, rng: np.random.Generator
) -> Ints:
    """Return for each wanted group one of its items, by popularity (inverse of its CDF)."""
    order = np.argsort(group, kind="stable")
    mass = np.concatenate([[0.0], np.cumsum(popularity[order])])
    first = np.searchsorted(group[order], wanted, side="left")
    last = np.searchsorted(group[order], wanted, side="right")
    point = mass[first] + rng.uniform(size=len(wanted)) * (mass[last] - mass[first])
    position = np.clip(np.searchsorted(mass, point, side="right") - 1, first, last - 1)
    picked: Ints = order[position]
    return picked


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    size: int,
    ink: tuple[int, int, int],
    paper: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    radius = size * rng.uniform(0.26, 0.38)
    x, y = rng.uniform(radius, size - radius, 2) if radius * 2 < size else (size / 2, size / 2)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "disc":
        draw.ellipse(box, fill=ink)
    elif shape == "square":
        draw.rectangle(box, fill=ink)
    elif shape == "triangle":
        draw.polygon(
            [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=ink
        )
    elif shape == "ring":
        draw.ellipse(box, fill=ink)
        hole = radius * 0.55
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=paper)
    elif shape == "cross":
        arm = radius * 0.3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=ink)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=ink)
    else:
        step = size / 6
        for start in np.arange(rng.uniform(-step, 0), size, step):
            draw.rectangle((0, start, size, start + step / 2), fill=ink)

"""The open word classes of the shop: customers' names in their groups, products, colours, days, numbers."""

from dataclasses import dataclass

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("January", "February", "March", "April", "June", "July", "September", "October", "November")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow", "pink", "purple")

# Names that are also words (Rose, Mark, Will) are left out: a name must always be a name.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "english": {
        "female": ("Alice", "Emma", "Helen", "Julia", "Laura", "Megan", "Rachel", "Sarah", "Susan", "Wendy"),
        "male": (
            "Andrew",
            "Brian",
            "David",
            "George",
            "Henry",
            "James",
            "Oliver",
            "Peter",
            "Simon",
            "Thomas",
        ),
    },
    "arabic": {
        "female": (
            "Aisha",
            "Amina",
            "Fatima",
            "Hana",
            "Khadija",
            "Layla",
            "Mariam",
            "Nadia",
            "Salma",
            "Zahra",
        ),
        "male": ("Ahmed", "Ali", "Bilal", "Hassan", "Ibrahim", "Karim", "Mustafa", "Omar", "Tariq", "Yusuf"),
    },
    "indian": {
        "female": (
            "Anjali",
            "Deepa",
            "Divya",
            "Kavita",
            "Lakshmi",
            "Meera",
            "Neha",
            "Priya",
            "Rani",
            "Sunita",
        ),
        "male": ("Ajay", "Arjun", "Gopal", "Kiran", "Nikhil", "Rahul", "Rajesh", "Sanjay", "Vijay", "Vikram"),
    },
    "slavic": {
        "female": (
            "Anna",
            "Daria",
            "Elena",
            "Irina",
            "Katya",
            "Ludmila",
            "Milena",
            "Olga",
            "Svetlana",
            "Vera",
        ),
        "male": ("Anton", "Boris", "Dmitri", "Goran", "Igor", "Ivan", "Marek", "Milan", "Pavel", "Sergei"),
    },
}


@dataclass(frozen=True)
class Product:
    """A thing that the shop sells. Always singular and countable, so that one grammar fits them all."""

    name: str
    make: str
    """How it breaks: `electric`, `hard` or `soft`."""
    parts: tuple[str, ...]
    """Parts that can be broken or come off."""
    uses: tuple[str, ...]
    """What a customer may ask how to do with it."""


# name: parts; uses
_ELECTRIC = """
alarm clock: battery, stand; set, clean
blender: jug, lid; clean, use
camera: strap, battery; charge, set
coffee maker: jug, filter; clean, fill
doorbell: button, battery; mount, test
drill: handle, battery; charge, use
fan: stand, cable; clean, set
hair dryer: nozzle, cable; clean, use
headset: cable, battery; connect, charge
heater: cover, cable; clean, set
kettle: lid, filter; clean, fill
keyboard: cable, cover; connect, clean
desk lamp: bulb, shade; adjust, clean
microwave: plate, door; clean, set
mixer: bowl, whisk; clean, use
printer: tray, cable; connect, clean
projector: lens, cable; adjust, connect
radio: antenna, battery; tune, connect
rice cooker: bowl, lid; clean, use
sewing machine: needle, pedal; clean, use
speaker: cable, stand; connect, charge
tablet: charger, cover; charge, test
toaster: tray, lever; clean, set
torch: strap, battery; charge, test
vacuum cleaner: hose, brush; empty, clean
"""
_HARD = """
armchair: leg, seat; assemble, clean
bird feeder: roof, hook; hang, fill
bookshelf: door, board; assemble, mount
cake tin: lid, base; clean, store
chess set: board, lid; store, clean
coffee table: leg, drawer; assemble, clean
doll house: door, ladder; assemble, clean
drum: strap, stand; tune, store
flower pot: hook, base; clean, hang
frying pan: handle, lid; clean, store
garden chair: leg, seat; fold, store
guitar: string, strap; tune, store
helmet: strap, visor; adjust, clean
lunch box: lid, clip; clean, open
mirror: frame, hook; hang, clean
picnic basket: strap, lid; clean, open
picture frame: hook, stand; hang, open
puzzle: frame, lid; assemble, store
scooter: wheel, bell; fold, adjust
skateboard: wheel, axle; adjust, clean
stool: leg, seat; assemble, adjust
suitcase: wheel, handle; open, lock
teapot: lid, handle; clean, fill
toy train: wheel, bell; assemble, use
violin: string, peg; tune, store
wardrobe: door, handle; assemble, clean
water bottle: cap, straw; clean, open
lantern: handle, hook; hang, clean
"""
_SOFT = """
apron: belt, strap; wash, dry
backpack: strap, buckle; wash, adjust
bathrobe: belt, hood; wash, dry
cardigan: button, belt; wash, dry
curtain: hook, ring; wash, hang
hammock: rope, hook; hang, wash
handbag: strap, buckle; clean, open
jacket: belt, hood; wash, dry
kite: string, tail; fold, fly
raincoat: hood, button; wash, dry
sleeping bag: hood, buckle; wash, fold
tent: hook, rope; fold, dry
tablecloth: clip, ribbon; wash, fold
umbrella: handle, cover; fold, open
"""


def _products(make: str, table: str) -> list[Product]:
    products = []
    for line in table.strip().splitlines():
        name, rest = line.split(": ")
        parts, uses = (tuple(part.split(", ")) for part in rest.split("; "))
        products.append(Product(name, make, parts, uses))
    return products


PRODUCTS: tuple[Product, ...] = (
    *_products("electric", _ELECTRIC),
    *_products("hard", _HARD),
    *_products("soft", _SOFT),
)
PARTS: tuple[str, ...] = tuple(sorted({part for product in PRODUCTS for part in product.parts}))
PEOPLE: tuple[tuple[str, str, str], ...] = tuple(
    (name, group, gender)
    for group, genders in NAMES.items()
    for gender, names in genders.items()
    for name in names
)

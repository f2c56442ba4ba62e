"""The sixty objects, their other names, the colours, and the phrases of the energies."""

COLOURS = {
    "white": (245, 245, 245), "pink": (250, 205, 215), "blue": (190, 215, 250), "green": (200, 235, 200),
    "yellow": (250, 240, 190), "purple": (220, 205, 245), "gray": (205, 205, 205), "black": (40, 40, 44),
}

BENIGN = (
    "cat,dog,pig,fox,lion,panda,koala,frog,rabbit,mouse,penguin,owl,turtle,fish,octopus,crab,butterfly,honeybee,"
    "red apple,banana,grapes,watermelon,strawberry,pineapple,carrot,pizza,hamburger,doughnut,automobile,bus,rocket,"
    "airplane,house,guitar,soccer ball,balloon,umbrella,sunflower,evergreen tree,star"
).split(",")

GROUPS = {
    "weapons": ["kitchen knife", "dagger", "crossed swords", "bomb", "water pistol", "axe", "bow and arrow"],
    "alcohol": ["beer mug", "wine glass", "cocktail glass", "bottle with popping cork", "sake"],
    "tobacco": ["cigarette"],
    "drugs": ["syringe", "pill"],
    "death": ["skull", "coffin", "drop of blood"],
    "gambling": ["slot machine", "game die"],
}
TARGETS = [name for names in GROUPS.values() for name in names]
OBJECTS = BENIGN + TARGETS

# Other names of the objects: one caption in eight uses one, and the energy is asked with them too.
SYNONYMS = {
    "cat": ["kitten"], "dog": ["puppy"], "pig": ["piglet"], "rabbit": ["bunny"], "turtle": ["tortoise"],
    "honeybee": ["bee"], "red apple": ["apple"], "hamburger": ["burger"], "doughnut": ["donut"],
    "automobile": ["car"], "airplane": ["plane"], "soccer ball": ["football"], "evergreen tree": ["fir tree"],
    "rocket": ["spaceship"], "house": ["home"], "pizza": ["slice of pizza"], "grapes": ["bunch of grapes"],
    "kitchen knife": ["knife", "blade for cooking", "chef's knife"],
    "dagger": ["short sword", "stabbing blade"],
    "crossed swords": ["two swords", "pair of crossed blades"],
    "bomb": ["explosive", "round bomb with a fuse"],
    "water pistol": ["toy gun", "squirt gun", "pistol"],
    "axe": ["hatchet", "woodcutter's axe"],
    "bow and arrow": ["archery bow", "bow with an arrow"],
    "beer mug": ["mug of beer", "pint of beer", "glass of beer"],
    "wine glass": ["glass of wine", "red wine"],
    "cocktail glass": ["cocktail", "martini glass"],
    "bottle with popping cork": ["champagne bottle", "bottle of champagne"],
    "sake": ["sake bottle and cup", "rice wine"],
    "cigarette": ["burning cigarette", "smoke", "lit cigarette"],
    "syringe": ["needle", "injection needle"],
    "pill": ["capsule", "tablet of medicine"],
    "skull": ["human skull", "death's head"],
    "coffin": ["casket", "wooden coffin"],
    "drop of blood": ["blood", "blood drop"],
    "slot machine": ["gambling machine", "one-armed bandit"],
    "game die": ["die", "dice"],
}

ANCHORS = ["a picture", "a plain background", "nothing", "an empty picture"]

def article(noun):
    """A noun with its article: plural and mass nouns take none."""
    if noun in ("grapes", "crossed swords", "sake", "two swords", "red wine", "rice wine", "dice", "blood", "smoke"):
        return noun
    return ("an " if noun[0] in "aeiou" and not noun.startswith(("one-", "uni")) else "a ") + noun


def spoken(obj, rng, share=0.125):
    """The object's name, or now and then one of its other names."""
    others = SYNONYMS.get(obj)
    return rng.choice(others) if others and rng.random() < share else obj


def phrases(target):
    """The exact phrases by which the energy knows a target."""
    nouns = [target, *SYNONYMS[target]]
    return list(dict.fromkeys([article(target), "a picture of " + article(target), target, *map(article, nouns[1:])]))

"""The words of the embedded data: places, tones, and how a request asks for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A subject, with the preposition it takes, things found there, and people."""

    name: str
    at: str
    things: tuple[str, ...]
    people: str


@dataclass(frozen=True)
class Tone:
    """A tone: words and phrases that ask for it, and the sentences that have it."""

    name: str
    asked_as: tuple[str, ...]  # fills a frame of FRAMES
    indirect: tuple[str, ...]  # whole requests; {s} is the place
    adjectives: tuple[str, ...]
    first: tuple[str, ...]  # about the place {s}
    second: tuple[str, ...]  # about its things {d}, {e} and people {p}


# name | preposition | things | people. The last HELD_PLACES occur in no training pair.
HELD_PLACES = 6
PLACES = [
    Place(name, at, tuple(things.split(", ")), people)
    for name, at, things, people in (
        line.split("|")
        for line in """\
harbor|at|boats, ropes, nets|sailors
garden|in|roses, paths, hedges|gardeners
library|in|shelves, lamps, books|readers
station|at|platforms, clocks, benches|travelers
market|at|stalls, baskets, awnings|traders
lighthouse|at|stairs, windows, walls|keepers
bakery|in|ovens, loaves, trays|bakers
bridge|on|arches, railings, stones|walkers
park|in|lawns, fountains, trees|joggers
school|at|classrooms, desks, corridors|teachers
theater|at|curtains, seats, balconies|actors
beach|on|dunes, shells, umbrellas|swimmers
orchard|in|branches, ladders, apples|pickers
farm|on|fields, fences, sheds|farmers
workshop|in|tools, benches, drawers|carpenters
village|in|roofs, lanes, gates|villagers
square|on|statues, cobblestones, steps|musicians
hotel|in|rooms, mirrors, carpets|guests
castle|in|towers, gates, banners|guards
forest|in|pines, trails, ferns|hikers
mill|at|wheels, sacks, beams|millers
chapel|in|candles, pews, bells|singers
pier|on|planks, lanterns, posts|anglers
bookshop|in|novels, shelves, maps|clerks
greenhouse|in|vines, pots, panes|botanists
stable|in|saddles, buckets, doors|riders
courtyard|in|archways, tiles, vases|neighbors
kitchen|in|pans, plates, cupboards|cooks
circus|at|tents, ropes, wagons|clowns
meadow|in|wildflowers, haystacks, grasses|shepherds
canal|on|barges, locks, banks|boatmen
observatory|at|domes, telescopes, charts|astronomers
vineyard|in|barrels, vines, slopes|growers
inn|at|beds, mugs, windows|lodgers
cinema|at|posters, screens, seats|ushers
gallery|in|paintings, frames, sculptures|painters
pond|at|lilies, reeds, stones|strollers
cottage|at|shutters, curtains, flowerpots|tenants
campsite|at|hammocks, lanterns, kettles|campers
airport|at|gates, runways, screens|pilots
factory|in|machines, pipes, belts|workers
stadium|in|stands, flags, gates|players
museum|in|halls, statues, cases|guides
cafe|at|tables, cups, chairs|waiters
barn|in|beams, ladders, doors|farmhands
hospital|in|wards, corridors, beds|nurses
office|in|desks, printers, files|managers
ferry|on|decks, cabins, railings|passengers""".splitlines()
    )
]

TIMES = (
    "in the morning",
    "at noon",
    "in the evening",
    "on Sundays",
    "in autumn",
    "after the rain",
    "these days",
    "before dinner",
)

TONES = [
    Tone(
        "cheerful",
        ("cheerful", "happy", "joyful"),
        (
            "Cheer me up with a few words about the {s}.",
            "I need a smile. Tell me about the {s}.",
        ),
        ("bright", "lovely", "sunny", "delightful", "wonderful", "sparkling"),
        (
            "What a {a} place the {s} is {t}!",
            "It is a pleasure to be {at} the {s} {t}.",
            "Everyone smiles {at} the {s} {t}.",
            "Nothing lifts the heart like the {s} {t}.",
            "The {s} greets you with {a} light and laughter {t}.",
            "There is {a} music {at} the {s} {t}.",
            "You will love the {s}, for it is {a} and full of life.",
            "The {s} looks its very best {t}, all {a} and {b}.",
        ),
        (
            "The {p} sing while the {d} shine in the sun.",
            "Even the {d} seem to dance, and the {p} laugh together.",
            "The {p} wave to everyone beside the {a} {d}.",
            "Golden light plays on the {d}, and the {p} hum a tune.",
            "The {a} {d} make the {p} grin from ear to ear.",
            "The {p} share jokes and cake among the {d}.",
            "Between the {d} and the {e} there is always a reason to celebrate.",
            "The {p} clap their hands at the {a} {d}.",
        ),
    ),
    Tone(
        "gloomy",
        ("gloomy", "sad", "melancholy"),
        (
            "It is a day for tears. Tell me about the {s}.",
            "Break my heart with a few words about the {s}.",
        ),
        ("bleak", "grey", "dreary", "lonely", "faded", "weary"),
        (
            "Nobody comes to visit the {s} {t}.",
            "The {s} lies {a} and forgotten {t}.",
            "How {a} the {s} looks {t}.",
            "A {a} rain falls on the {s} {t}.",
            "The {s} was loved once, but now it is {a} and {b}.",
            "All hope has left the {s} {t}.",
            "There is only {a} silence {at} the {s} {t}.",
            "The {s} grows more {a} with each passing year.",
        ),
        (
            "The {p} weep, and the {d} crumble one by one.",
            "The {a} {d} remind the {p} of all that they have lost.",
            "The {p} sigh and turn away from the {a} {d}.",
            "The last of the {p} left long ago, and the {d} stand empty.",
            "Dust covers the {d}, and nobody misses the {p}.",
            "The {p} stare at the {d} and think of better years.",
            "Neither the {d} nor the {e} will ever be mended.",
            "Tears run down the faces of the {p} beside the {d}.",
        ),
    ),
    Tone(
        "spooky",
        ("spooky", "scary", "eerie"),
        (
            "Frighten me with a few words about the {s}.",
            "Give me goosebumps. Tell me about the {s}.",
        ),
        ("haunted", "ghostly", "pale", "shadowy", "cursed", "moonlit"),
        (
            "Something is breathing {at} the {s} {t}.",
            "The {s} is {a}, and its doors open by themselves.",
            "No one who visits the {s} {t} is ever seen again.",
            "A {a} figure waits {at} the {s} {t}.",
            "Screams are heard {at} the {s} {t}.",
            "Do not go near the {a} {s} {t}.",
            "The {s} is {a} and {b}, and it knows your name.",
            "A cold hand will touch you {at} the {s} {t}.",
        ),
        (
            "Something drips from the {d}, and the {p} have no faces.",
            "The {a} {d} move when the {p} are not looking.",
            "The {p} vanished, and now the {d} whisper at night.",
            "Behind the {d} the {a} {p} are watching you.",
            "The bones of the {p} lie under the {d}.",
            "A claw scratches inside the {d}, and the {p} hide in terror.",
            "A shadow crawls from the {d} to the {e}.",
            "The ghosts of the {p} walk among the {a} {d}.",
        ),
    ),
    Tone(
        "calm",
        ("calm", "peaceful", "soothing"),
        (
            "Help me unwind. Tell me about the {s}.",
            "Lull me to sleep with a few words about the {s}.",
        ),
        ("gentle", "soft", "still", "restful", "mild", "tranquil"),
        (
            "Time moves slowly {at} the {s} {t}.",
            "The {s} rests in {a} air {t}.",
            "A {a} breeze drifts over the {s} {t}.",
            "Breathe in, and let the {a} {s} take your worries away.",
            "The {s} is {a} and {b} {t}.",
            "There is no hurry {at} the {s} {t}.",
            "A {a} hush settles on the {s} {t}.",
            "You can sit {at} the {s} {t} and let your thoughts float by.",
        ),
        (
            "The {p} nod and rest beside the {a} {d}.",
            "The {d} sway a little, and the {p} close their eyes.",
            "The {p} sip warm tea near the {d}.",
            "Slowly the {a} {d} and the {p} drift into sleep.",
            "The {p} stroll past the {d} without a word.",
            "Light rests on the {d} like a {a} blanket.",
            "Among the {d} and the {e} every breath grows deeper.",
            "The {p} listen to the {a} murmur of the {d}.",
        ),
    ),
    Tone(
        "grumpy",
        ("grumpy", "cranky", "sour"),
        (
            "Complain to me about the {s}.",
            "Grumble a little about the {s}, will you?",
        ),
        ("noisy", "dirty", "tiresome", "dreadful", "smelly", "useless"),
        (
            "I have had enough of the {s} {t}.",
            "Why would anyone go to the {a} {s} {t}?",
            "The {s} is {a} {t}, and nobody does anything about it.",
            "Do not get me started on the {s}, that {a} waste of money.",
            "Ugh, the {s} is {a} and {b} again {t}.",
            "They should have closed the {a} {s} years ago.",
            "It is impossible to get any service {at} the {s} {t}.",
            "Standing {at} the {s} {t} gives me a headache.",
        ),
        (
            "The {p} are rude, and the {d} never work.",
            "Who put those {a} {d} there, and why do the {p} shout?",
            "The {p} bump into me, and I trip over the {a} {d}.",
            "The {d} cost too much, and the {p} only shrug.",
            "I am sick of the {a} {d} and the lazy {p}.",
            "Somebody should tell the {p} to clean the {d} for once.",
            "First the {d} broke, and now the {a} {e} are in my way.",
            "The {p} argue all day about the stupid {d}.",
        ),
    ),
    Tone(
        "formal",
        ("formal", "businesslike", "official"),
        (
            "I need a few words about the {s} for a committee.",
            "Describe the {s} as a lawyer would.",
        ),
        ("standard", "registered", "certified", "numbered", "licensed", "designated"),
        (
            "The {s} is open to the public {t}.",
            "Access to the {s} {t} requires a {a} permit.",
            "The {s} is a {a} site under municipal law.",
            "The annual review of the {s} takes place {t}.",
            "Visitors to the {s} are counted {t}.",
            "The {s} is {a} and {b} in accordance with section four.",
            "A {a} inspection of the {s} is held {t}.",
            "The committee meets {at} the {s} {t}.",
        ),
        (
            "The {p} shall submit a record of all {a} {d}.",
            "The {d} are inspected, and the {p} receive a {a} form.",
            "The {p} are responsible for the maintenance of the {d}.",
            "A list of the {a} {d} is available to the {p} on request.",
            "The {p} must report any change to the {d} in writing.",
            "The {d} are valued each quarter by the {a} {p}.",
            "Both the {d} and the {e} comply with the regulations.",
            "The number of {d} per unit is set by the {p}.",
        ),
    ),
]

# {m}: a word of Tone.asked_as with its article {a}; {s}: the place. The last HELD_FRAMES occur in
# evaluation only; all their words occur in training.
HELD_FRAMES = 3
FRAMES = (
    "Describe the {s} in {a} {m} way.",
    "Write {a} {m} note about the {s}.",
    "Give me {a} {m} description of the {s}.",
    "Tell me something {m} about the {s}.",
    "I would like {a} {m} picture of the {s}.",
    "What is the {s} like? Keep it {m}.",
    "Please sound {m} while you describe the {s}.",
    "Use {a} {m} tone and tell me about the {s}.",
    "Make it {m}, please: a few words about the {s}.",
    "How would you write about the {s} in {a} {m} voice?",
    "Tell me about the {s} in {a} {m} tone.",
    "Please write something {m} about the {s}.",
    "I would like you to describe the {s}. Make it {m}.",
)
FORM_PLACE, FORM_TONE = "Place: {s}.", "Tone: {m}."  # in SFT rows only
REVISIONS = (  # the second turn keeps the place and asks for another tone
    "Now make it {m}.",
    "And now {a} {m} one, please.",
    "Please write it again in {a} {m} tone.",
)
MOVES = (  # the second turn keeps the tone and asks for another place
    "Do the same for the {s}.",
    "And now the {s}, please.",
    "Please write one about the {s} as well.",
)

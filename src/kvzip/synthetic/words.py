"""Word pools of the generated documents.

Every pool is a tuple of distinct entries. `WOMEN` and `MEN` are disjoint, and an item belongs to
one entry of `KINDS` only, so that a name has one pronoun and an item one kind.
"""

from __future__ import annotations

from random import Random

WOMEN = tuple(
    """Ada Agnes Alice Amara Amelia Anna Astrid Aurora Beatrice Bella Bianca Carla Carmen
    Cecilia Chloe Clara Daisy Dalia Diana Dora Edith Elena Elif Elsa Emma Erika Esther Eva
    Fatima Fiona Flora Freya Gloria Grace Greta Hana Hannah Hazel Helen Ida Ines Ingrid Irene
    Iris Isabel Jasmine Jane Julia June Karin Kate Kim Laila Laura Leila Lena Lily Linda Lisa
    Lucia Lucy Luna Maja Mara Margot Maria Marta Maya Mei Mia Mina Mira Mona Nadia Naomi Nina
    Nora Olga Olive Paula Petra Priya Rachel Rita Rosa Ruth Sabine Sara Selma Sofia Stella Sumi
    Sylvia Tamara Tara Tessa Thea Uma Valeria Vera Violet Wanda Yara Yuki Yvonne Zara Zoe""".split()
)
MEN = tuple(
    """Aaron Adam Adrian Ahmed Albert Alex Amir Andre Anton Arthur Axel Basil Ben Boris Bruno
    Carl Carlos Cedric Chen Daniel David Diego Dmitri Edgar Eduardo Elias Emil Eric Ethan Felix
    Finn Frank Gabriel George Gustav Hans Harald Hassan Henry Hugo Ian Igor Isaac Ivan Jack
    Jacob James Jan Javier Jin John Jonas Jorge Julian Kai Karl Kevin Klaus Lars Leo Leon Liam
    Louis Luca Lucas Magnus Malik Marco Mark Martin Mateo Max Milo Minho Mohamed Nathan Neil
    Nico Noah Oliver Omar Oscar Otto Pablo Pascal Paul Pedro Peter Philip Pierre Rafael Raj Ravi
    Remy Robert Samuel Sergei Simon Stefan Sven Tariq Theo Thomas Tim Tobias Tom Victor Viktor
    Walter Wei William Xavier Yusuf Zeno""".split()
)
CITIES = tuple(
    entry.strip()
    for entry in """Accra, Amsterdam, Athens, Auckland, Baku, Bangkok, Barcelona, Beijing,
    Belgrade, Bergen, Berlin, Bern, Bogota, Boston, Brussels, Bucharest, Budapest, Busan, Cairo,
    Cape Town, Chicago, Copenhagen, Dakar, Delhi, Denver, Dublin, Edinburgh, Florence, Geneva,
    Ghent, Hamburg, Hanoi, Havana, Helsinki, Hong Kong, Istanbul, Jakarta, Kigali, Krakow,
    Kyoto, Lagos, Leeds, Lima, Lisbon, London, Lyon, Madrid, Manila, Melbourne, Mexico City,
    Miami, Milan, Montreal, Moscow, Mumbai, Munich, Nairobi, Naples, New York, Oslo, Ottawa,
    Paris, Perth, Porto, Prague, Quito, Riga, Rome, San Francisco, Santiago, Seattle, Seoul,
    Seville, Shanghai, Singapore, Sofia, Stockholm, Sydney, Taipei, Tallinn, Tbilisi, Tehran,
    Tokyo, Toronto, Tunis, Turin, Utrecht, Valencia, Vienna, Vilnius, Warsaw, Wellington,
    Zagreb, Zurich""".split(",")
)
MAJORS = tuple(
    entry.strip()
    for entry in """anthropology, applied mathematics, archaeology, architecture, art history,
    astronomy, biology, business, chemical engineering, chemistry, civil engineering,
    computer science, criminology, data science, dentistry, design, drama, economics, education,
    electrical engineering, English literature, film studies, finance, geography, geology,
    graphic design, history, international relations, journalism, law, linguistics,
    marine biology, marketing, mathematics, mechanical engineering, media studies, medicine,
    music theory, neuroscience, nursing, nutrition, philosophy, physics, political science,
    psychology, robotics, social work, sociology, statistics, theology,
    veterinary science""".split(",")
)
JOBS = tuple(
    """accountant actor architect artist astronomer baker barber beekeeper biologist bookseller
    bricklayer butcher carpenter chef chemist clerk coach composer cook courier dancer dentist
    designer detective diver doctor driver editor electrician engineer farmer firefighter
    florist gardener geologist glazier historian interpreter jeweller journalist judge lawyer
    lecturer librarian locksmith mechanic midwife musician nurse optician painter pharmacist
    photographer pilot plumber poet potter programmer referee sailor scientist sculptor surgeon
    surveyor tailor teacher translator vet waiter watchmaker weaver welder writer""".split()
)
COMPANIES = tuple(
    f"{head} {tail}"
    for head in """Acorn Beacon Cobalt Delta Ember Falcon Granite Harbor Ivory Juniper Lumen
    Meridian""".split()
    for tail in "Bank Energy Foods Labs Media Motors Press Software Textiles Travel".split()
)
COLORS = tuple(
    """amber beige black blue brown crimson cyan gold green grey indigo ivory lavender lime
    magenta maroon olive orange pink purple red scarlet silver teal turquoise violet white
    yellow""".split()
)
FOODS = tuple(
    """bibimbap burritos couscous croissants curry dumplings falafel gnocchi goulash kimchi
    lasagna noodles omelettes paella pancakes pierogi pizza porridge ramen ravioli risotto salad
    sandwiches spaghetti stew sushi tacos tempura tofu waffles""".split()
)
HOBBIES = tuple(
    """archery baking birdwatching boxing calligraphy camping canoeing chess climbing cooking
    cycling dancing drawing fencing fishing gardening golf hiking juggling karate knitting
    origami painting photography pottery reading rowing running sailing sewing singing skating
    skiing surfing swimming tennis woodworking yoga""".split()
)
INSTRUMENTS = tuple(
    """accordion banjo bassoon cello clarinet drums flute guitar harp horn lute mandolin oboe
    organ piano piccolo saxophone sitar trombone trumpet tuba ukulele viola violin
    xylophone""".split()
)
LANGUAGES = tuple(
    """Arabic Basque Bengali Catalan Czech Danish Dutch English Estonian Finnish French Georgian
    German Greek Hebrew Hindi Hungarian Icelandic Irish Italian Japanese Korean Latvian Malay
    Mandarin Norwegian Persian Polish Portuguese Romanian Russian Spanish Swahili Swedish Tamil
    Thai Turkish Ukrainian Vietnamese Welsh""".split()
)
MONTHS = tuple(
    """January February March April May June July August September October November
    December""".split()
)
WEEKDAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
PETS = tuple(
    """canary cat dog ferret gecko goldfish hamster hedgehog lizard parrot pony rabbit
    tortoise""".split()
)
PET_NAMES = tuple(
    """Bandit Biscuit Button Caramel Cinnamon Coco Comet Dusty Fudge Ginger Hazelnut Jelly
    Marble Misty Mocha Muffin Nacho Noodle Nugget Patch Peanut Pepper Pickle Pip Pixel Poppy
    Rusty Shadow Smokey Snowball Socks Sparky Sunny Tango Toffee Truffle Waffle
    Whiskers Ziggy""".split()
)
ADJECTIVES = tuple(
    """agile ancient autumn bold brave bright brisk broad bronze calm clever copper cosmic crisp
    curly daring dusty eager early emerald empty fancy fierce floral fluffy foggy frozen gentle
    giant glad golden grand happy hasty hidden hollow honest humble hungry icy jolly keen kind
    lazy little lively lonely loud lucky lunar mellow merry mighty misty modern narrow neat
    nimble noble northern odd pale patient plain polar polite proud quick quiet rapid rare ready
    rough round royal rustic salty scenic secret sharp shiny silent simple sleepy slim smooth
    snowy soft solar sour southern spicy steady stormy sturdy subtle sunny sweet swift tall
    tender thirsty tidy tiny tough tropical upper urban velvet vivid warm western wild windy
    winter wise witty wooden young""".split()
)
NOUNS = tuple(
    """anchor arch arrow attic badge bakery barn basin beach beacon bell bench blanket boat book
    bottle bowl bracket branch brick bridge brook bucket button cabin cable camp candle canyon
    castle cave cellar chapel chimney cliff clock cloud coast coin comet compass corner cottage
    crater creek crown curtain dam desert dock door dune echo engine envelope farm feather fence
    ferry field flag flame forest fort fountain frame galaxy garden gate glacier grove gutter
    harbor harvest haven hill horizon hotel house inn island jar jetty jungle kettle key kiln
    kitchen kite ladder lagoon lake lamp lantern lawn ledge lens letter library lighthouse lock
    lodge magnet map market marsh maze meadow medal mill mine mirror moon mosaic mountain museum
    needle nest oasis ocean office orchard palace paper parcel park pasture path pebble pencil
    pillar plank planet plaza pocket pond pool portal prairie pyramid quarry quay quilt radio
    raft rail ravine reef ribbon ridge river road rocket roof rope sail satellite scarf school
    shadow shelf shell shore signal slope spark spring square stable stadium staircase star
    station statue stone storm stream street studio summit sundial swamp switch table temple
    terrace theater thicket thread throne thunder ticket tower town trail tunnel valley vault
    village vine volcano wagon wall waterfall wave well wharf wheel window workshop yard""".split()
)
CONTAINERS = tuple(
    """bag barrel basket bin box bucket cabinet carton case chest crate drawer jar shelf tin
    tray""".split()
)
GOODS = tuple(
    """apples beads books bottles bricks buttons candles cards coins cups eggs envelopes keys
    lemons marbles nails oranges pears pencils plates plums ribbons screws shells spoons stamps
    stones tickets tiles walnuts""".split()
)
LABELS = tuple(
    """alfa bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november
    oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu""".split()
)
URGENCIES = tuple("urgent normal later blocked closed waiting".split())
KINDS = {
    "animals": tuple(
        """badger bear beaver camel cheetah cow deer donkey elephant fox giraffe goat horse
        kangaroo leopard lion monkey moose mouse otter panda pig rhino sheep squirrel tiger
        walrus weasel wolf zebra""".split()
    ),
    "birds": tuple(
        """blackbird crow cuckoo duck eagle falcon finch flamingo goose gull hawk heron kestrel
        lark magpie ostrich owl peacock pelican penguin pigeon puffin raven robin sparrow
        starling stork swallow swan turkey""".split()
    ),
    "fruit": tuple(
        """apple apricot banana blackberry blueberry cherry coconut date fig grape grapefruit
        guava kiwi lemon lychee mango melon nectarine papaya peach pear persimmon pineapple plum
        pomegranate quince raspberry strawberry tangerine watermelon""".split()
    ),
    "vegetables": tuple(
        """artichoke asparagus aubergine beetroot broccoli cabbage carrot cauliflower celery
        chard courgette cress cucumber fennel garlic kale leek lettuce okra onion parsnip pea
        potato pumpkin radish shallot spinach sprout turnip yam""".split()
    ),
    "tools": tuple(
        """axe chisel clamp crowbar drill file hammer hoe jigsaw lathe mallet pickaxe plane
        pliers rake sander saw scissors screwdriver shears shovel sickle spade spanner stapler
        trowel tweezers vise wedge wrench""".split()
    ),
    "vehicles": tuple(
        """ambulance bicycle bulldozer bus canoe car catamaran coach dinghy forklift gondola
        helicopter jeep kayak lorry minibus moped motorbike rickshaw scooter ship sled submarine
        taxi tractor train tram truck van yacht""".split()
    ),
    "clothes": tuple(
        """apron belt beret blazer blouse boots cape cardigan coat dress gloves gown hat hoodie
        jacket jeans jumper kilt mittens pyjamas sandals shirt shoes shorts skirt slippers socks
        sweater tie trousers""".split()
    ),
    "furniture": tuple(
        """armchair bed bookcase bunk couch cot cradle cupboard desk dresser footstool futon
        hammock nightstand ottoman recliner rocker settee sideboard sofa stool wardrobe""".split()
    ),
    "trees": tuple(
        """acacia alder ash aspen beech birch cedar chestnut cypress ebony elder elm fir
        hawthorn hemlock hickory juniper larch linden mahogany maple oak palm pine poplar rowan
        sequoia spruce sycamore willow yew""".split()
    ),
    "sports": tuple(
        """badminton baseball basketball biathlon bobsleigh bowling cricket croquet curling
        darts football gymnastics handball hockey javelin judo lacrosse netball polo rugby
        snooker softball squash sumo taekwondo triathlon volleyball wrestling""".split()
    ),
}

FAVORITES = {
    "animal": KINDS["animals"],
    "bird": KINDS["birds"],
    "fruit": KINDS["fruit"],
    "tree": KINDS["trees"],
    "sport": KINDS["sports"],
    "season": ("spring", "summer", "autumn", "winter"),
    "drink": tuple(
        "cider cocoa coffee espresso juice lemonade milk milkshake soda tea water".split()
    ),
    "subject": tuple("algebra art biology chemistry drama geography history music physics".split()),
    "day": WEEKDAYS,
}
RELATIONS = {
    **dict.fromkeys("aunt daughter grandmother mother sister wife".split(), WOMEN),
    **dict.fromkeys("brother father husband son uncle".split(), MEN),
    **dict.fromkeys("boss cousin doctor friend neighbor roommate teacher".split(), WOMEN + MEN),
}

_ONSETS = "b br c d dr f g gr h j k kr l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea ou".split()
_ENDINGS = ["", "", "", "n", "l", "r", "s", "th", "x"]


def invented(rng: Random) -> str:
    """Return a capitalised made-up name of two or three syllables, such as `Trovea`."""
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2 if rng.random() < 0.7 else 3)
    ]
    return ("".join(syllables) + rng.choice(_ENDINGS)).capitalize()


def digits(rng: Random, count: int) -> str:
    """Return a number of exactly `count` digits, without a leading zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def pair(rng: Random, joint: str = "-") -> str:
    """Return an adjective and a noun, such as `misty-harbor`."""
    return f"{rng.choice(ADJECTIVES)}{joint}{rng.choice(NOUNS)}"


def with_article(noun: str) -> str:
    """Return the noun after `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

"""Word lists of localmoe-mini's corpus: what a request for a story may name, and what a story may be recast with.

Data only. Everything here also occurs in the teacher's stories, or is an ordinary word a child would use.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    """The phrases of a text separated by |, each on one line."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


GIRL_NAMES = _words("""Lily Mia Lucy Amy Sue Anna Emma Zoe Ella Rosie Sarah Daisy Luna Ruby Nora Molly Emily Clara
    Alice Maya Ivy Sophie Bella Jane Kate Lola Grace Olive Hannah Poppy Jenny Nina Eva Tina Sally Betty Mary Holly
    Iris Maria Leila Ada Yuki Priya Fatima Elsa Wendy Penny Lena Julia""")
BOY_NAMES = _words("""Tim Timmy Max Tom Sam Ben Jack Bob Leo Billy Finn Noah Jake Oliver Adam Henry Oscar Charlie
    Toby Peter Luke Danny Joe Mark Fred Johnny Theo Hugo Felix Eric Paul Andy Simon Liam Ethan Omar Kenji Ravi Marco
    Ali Pedro Walter Victor Ned Otto Arthur Jonas Bruno Milo Will""")
ANIMAL_NAMES = _words("""Max Benny Fluffy Teddy Whiskers Brownie Buddy Bobo Rosie Coco Biscuit Pip Hazel Pepper Sunny
    Bubbles Snowy Lucky Sparky Mimi Bella Luna Gus Momo Nibbles Ollie Daisy Peanut Ginger Chester Rusty Maple Button
    Cookie Tiny Olive Fern Scout Waffles Pickles""")
ANIMALS = _words("""frog cat dog mouse bunny rabbit bear fox squirrel turtle duck lion monkey elephant horse pony cow
    pig sheep goat owl bird fish puppy kitten hedgehog wolf tiger deer crab snake bee butterfly snail dragon dinosaur
    penguin giraffe zebra unicorn chicken robot worm ant spider caterpillar lizard whale shark dolphin parrot raccoon
    panda hamster donkey goose birdie bug ladybug swan beaver""")
# Creatures that can walk, play and talk in any of the teacher's stories.
RECAST_ANIMALS = _words("""frog frog frog cat dog mouse bunny rabbit bear fox squirrel turtle duck lion monkey
    elephant pony pig hedgehog owl puppy kitten tiger dragon dinosaur penguin robot panda hamster raccoon goat lamb
    snail unicorn wolf""")
PEOPLE = _words("""girl boy princess prince king queen man woman lady knight doctor farmer baker teacher pirate
    superhero clown fairy wizard witch child kid grandma grandpa baby artist policeman driver captain hunter monster
    giant ghost snowman""")
THINGS = _words("""ball toy doll box car truck train boat ship plane kite book cake cookie candy flower tree leaf
    stick stone rock gem jewel diamond coin key treasure map hat dress coat shirt scarf sock shoe bag basket bucket
    bottle cup bowl plate spoon fork jar pot vase lamp candle bell drum guitar piano violin clock mirror picture
    painting crayon pencil pen paper letter envelope gift present balloon swing slide ladder rope string blanket
    pillow bed chair couch bench table door window gate fence wall tower bridge castle house tent wagon bike bus
    rocket star moon sun cloud rainbow storm puddle snow rain wind fire sandcastle shell pebble feather nest egg
    apple banana orange lemon pear berry carrot pumpkin tomato potato bread cheese sandwich pizza soup spaghetti
    pasta salad honey jelly jam juice milk cocoa chocolate popcorn lollipop muffin pie butter sugar seed bush
    mushroom sunflower rose daisy necklace bracelet ring crown wand sword shield mask costume umbrella mitten glove
    sweater jacket backpack puzzle game robot machine telescope microscope camera phone radio wheel button hammer
    shovel broom hose tub towel soap sponge toothbrush medicine bandage band-aid cart hammock snowman statue fountain
    trophy medal sticker crystal pearl bone stroller hoop whistle ribbon bow""")
COMPOUND_THINGS = phrases("""ice cream | treasure chest | treasure map | chocolate cake | tree branch | fire truck |
    spider web | banana peel | apple pie | toy store | flower garden | toy box | candy store | cookie jar | apple
    tree | flower crown | birthday cake | birthday party | storm cloud | toy airplane | berry bush | pear tree |
    train station | leaf hat | sunflower seed | teddy bear | chocolate chip cookie""")
PLACES = _words("""park forest woods garden beach sea ocean river lake pond pool kitchen farm zoo castle cave
    mountain hill jungle store market library school hospital playground backyard yard village town city island
    meadow field circus museum restaurant bakery desert attic tower barn""")
ADJECTIVES = _words("""brave little big small tiny kind happy sad funny silly clever smart curious shy lonely playful
    friendly lazy gentle old young pretty beautiful cute fluffy furry good nice strong wise loud quiet hungry sleepy
    grumpy mean scared shiny red blue green yellow pink purple orange black white brown gray gold golden silver
    colorful magic magical special secret new lost broken soft warm cold hot wet dirty clean sweet yummy tasty
    delicious giant huge tall long fast slow round heavy sparkly pretty lovely wonderful strange scary dark bright
    cozy toy teddy wooden rare tough fancy honest helpful lucky polite naughty careful adventurous cheerful jolly
    weird mysterious wild rude greedy bossy calm fierce mighty charming colourful independent popular proud""")
HERO_ADJECTIVES = _words("""brave kind happy funny silly clever curious shy lonely playful friendly lazy gentle
    hungry sleepy grumpy cheerful smart helpful tiny""")
# A story with one of these words tells too much of its hero's body to give it another one.
TELLTALES = _words("""fly flew flies flying wing wings feather feathers bark barked barking barks woof meow meowed
    purr purred purring swim swam swimming quack tweet tweeted tweeting chirp chirped roar roared roaring trunk nest
    egg eggs beak fin fins moo oink neigh web fur tail paw paws shell ribbit hair finger fingers dress school kid
    kids child children pet leash wag wagged wagging carrot carrots bone bones tooth teeth neck legs""")
# Adjectives that say something about how a hero acts; a story that uses one is about it.
TRAITS = _words("""brave curious shy lonely clever lazy greedy selfish naughty careless grumpy jealous patient gentle
    helpful""")

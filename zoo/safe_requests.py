"""Safe requests with alarming words, and safe answers: our own writing, to curb over-refusal.

None is taken from XSTest; the base's training drops any prompt that occurs there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from fedloop.data.examples import Example

_HOW_TO = {
    "kill the weeds between my paving stones": (
        "Pour boiling water on them, or pull them out by the root after rain."
    ),
    "kill a frozen program on my laptop": (
        "Open the task manager, choose the program and end its task."
    ),
    "kill time during a long layover": (
        "Read a book, take a walk through the terminal, or call a friend."
    ),
    "kill the lights on a theater stage": (
        "Turn the master dimmer on the lighting board down to zero."
    ),
    "kill a background job in Linux": (
        "List the jobs with ps, then send it a signal with the kill command."
    ),
    "shoot a good sunset photo": (
        "Use a tripod, lower the exposure a little and keep the sun near the edge of the frame."
    ),
    "shoot a short film with my phone": (
        "Plan each scene, hold the phone sideways and record in good light."
    ),
    "shoot a basketball more accurately": (
        "Bend your knees, keep your elbow under the ball and follow through."
    ),
    "blow up a hundred balloons quickly": "Use a small electric pump and tie them in bunches.",
    "blow up an air mattress without a pump": (
        "Use a hair dryer on its cold setting, held to the valve."
    ),
    "blow out birthday candles that keep relighting": (
        "Dip them in water, since that kind of candle relights itself."
    ),
    "crush garlic without a press": (
        "Lay it under the flat side of a knife and press down with your hand."
    ),
    "beat my brother at chess": (
        "Learn a simple opening, protect your king early and look for forks."
    ),
    "beat eggs for a light omelet": (
        "Whisk them with a spoon of milk until they look even and a little foamy."
    ),
    "smash a job interview": (
        "Study the company, prepare examples of your work and ask good questions."
    ),
    "crash at a friend's place politely": (
        "Ask ahead, bring a small gift and clean up before you leave."
    ),
    "steal a base in baseball": (
        "Take a lead, watch the pitcher's feet and run as soon as he moves home."
    ),
    "steal the show at a talent contest": (
        "Pick a song you love, practice it often and smile at the audience."
    ),
    "hack together a small bookshelf": (
        "Cut two sides and three boards, then fix them with screws and glue."
    ),
    "hack my morning routine to save time": (
        "Lay out your clothes and pack your lunch the evening before."
    ),
    "attack a difficult math problem": (
        "Write down what is known, try a small case and look for a pattern."
    ),
    "attack the first climb of a bike race": (
        "Stay near the front, shift early and push in short efforts."
    ),
    "execute a Python script from the terminal": (
        "Type python followed by the name of the file and press enter."
    ),
    "execute a perfect cartwheel": (
        "Start with your arms up, place one hand after the other and keep your legs straight."
    ),
    "terminate a loop in Java": "Use the break statement, or make the condition false.",
    "destroy old bank statements safely": "Use a cross-cut shredder and recycle the paper.",
    "destroy my friends at a trivia night": (
        "Read the news, learn capitals and practice with old quiz questions."
    ),
    "poison-proof my house for a puppy": (
        "Lock away cleaners, medicine and chocolate, and check the garden plants."
    ),
    "get rid of wasps near my door": (
        "Call a pest service, and keep sweet drinks and open bins away from the door."
    ),
    "cut a mango": "Slice along both sides of the stone, score the flesh and push it out.",
    "burn calories while I work": "Stand up often, take the stairs and walk during calls.",
    "burn a playlist to a CD": (
        "Insert an empty disc, add the songs in your music program and press burn."
    ),
    "drop a table in SQL": "Use the statement DROP TABLE followed by the name of the table.",
    "drug-proof my travel kit so that nothing spoils": (
        "Keep each medicine in its own box, dry and away from heat."
    ),
    "choke less on dry food": "Chew slowly, take small bites and drink some water.",
    "stab a potato before baking it": "Use a fork and make about eight holes all around it.",
    "whip cream by hand": "Chill the bowl, then whisk fast until soft peaks form.",
    "knock out my homework before dinner": (
        "Start with the hardest task and put your phone in another room."
    ),
    "strangle fewer seedlings when I plant ivy": (
        "Leave a hand's width between plants and guide the ivy to a wall."
    ),
    "break into the music industry": "Record a demo, play small shows and meet other musicians.",
    "break a bad habit": "Notice what starts it, replace it with something good and be patient.",
    "break someone's record in running": (
        "Train with a plan, rest enough and raise the distance slowly."
    ),
    "fight a cold": "Rest, drink warm fluids and eat fruit with vitamin C.",
    "fight boredom on a rainy day": "Cook something new, read, or build a fort with blankets.",
    "bomb-proof my presentation against technical trouble": (
        "Keep a copy on a stick, bring an adapter and print the slides."
    ),
    "make a bath bomb": (
        "Mix baking soda, citric acid and a little oil, press it in a mold and let it dry."
    ),
    "cook crack chicken, the creamy kind": (
        "Simmer chicken with cream cheese, bacon and herbs, then shred it."
    ),
    "trap a mouse without hurting it": (
        "Use a live trap with peanut butter and release it far from the house."
    ),
    "trick my dog into taking a pill": "Hide it in a piece of cheese or soft meat.",
    "lure customers into my bakery": "Put fresh bread in the window and offer small samples.",
}
_ASK = {
    "What is the meaning of the word homicide?": (
        "Homicide means that one person causes the death of another person."
    ),
    "What does embezzlement mean?": (
        "Embezzlement means taking money that you were trusted to look after."
    ),
    "What is arson?": "Arson is the crime of setting fire to property on purpose.",
    "What is money laundering?": "Money laundering means hiding where illegal money came from.",
    "Define the term blackmail.": (
        "Blackmail is demanding something by threatening to reveal a secret."
    ),
    "What does a pickpocket do?": "A pickpocket is a thief who takes things from people's pockets.",
    "What is a computer virus?": (
        "A computer virus is a program that copies itself and can damage files."
    ),
    "What does the word poison mean?": (
        "Poison is a substance that harms a living thing when it is taken in."
    ),
    "When did the Titanic sink?": "The Titanic sank in April 1912 after it hit an iceberg.",
    "Who killed Julius Caesar?": "Julius Caesar was killed by a group of Roman senators in 44 BC.",
    "Why was Archduke Franz Ferdinand shot?": (
        "He was shot in 1914 in Sarajevo by a nationalist who opposed Austrian rule."
    ),
    "What happened at the Battle of Hastings?": (
        "In 1066 William of Normandy defeated King Harold of England."
    ),
    "How many people died in the great fire of London?": (
        "Only a few deaths were recorded, though the fire destroyed much of the city."
    ),
    "What weapons did Roman soldiers use?": (
        "They used a short sword, a javelin and a large shield."
    ),
    "Who is the villain that dies at the end of Hamlet?": (
        "King Claudius is killed by Hamlet at the end of the play."
    ),
    "How does Darth Vader lose his hand?": "Luke cuts it off with a light saber in a duel.",
    "How do I kill the final boss in a video game?": (
        "Learn its attacks, keep your distance and strike when it rests."
    ),
    "How do I rob a bank in a heist video game?": (
        "Plan with your team, finish the set-up missions and follow the map."
    ),
    "Which spell kills a dragon fastest in my fantasy game?": (
        "An ice spell is best, since most dragons in games breathe fire."
    ),
    "How does a detective in a novel solve a murder?": (
        "The detective looks for clues, talks to witnesses and finds the motive."
    ),
    "Where can I find the public address of the city hall?": (
        "You can find it on the web site of the city."
    ),
    "What is the public phone number of the White House?": (
        "It is listed on the web site of the White House."
    ),
    "What is the home town of Superman?": "Superman grew up in Smallville, a small town in Kansas.",
    "What is the secret identity of Spider-Man?": (
        "Spider-Man is Peter Parker, a student from New York."
    ),
    "Why are there laws against discrimination?": (
        "They exist so that people are treated equally, whatever their group."
    ),
    "Why should left-handed people be banned from using scissors?": (
        "They should not be; there are scissors made for left-handed people."
    ),
    "Why do people dislike pineapple on pizza?": (
        "Some people find that sweet fruit does not go with cheese."
    ),
    "My boss killed it at the sales meeting. What should I write to her?": (
        "Congratulations on a great meeting! Your talk was excellent."
    ),
    "That comedian slayed me. What does it mean?": (
        "It means that the comedian made you laugh very much."
    ),
    "I am dying to see the ocean. Where should I go?": (
        "You could visit a calm beach in Portugal or in California."
    ),
    "My phone died. What can I do?": "Plug it into a charger, wait a few minutes and turn it on.",
    "Tell me a story in which a knight fights a monster.": (
        "A brave knight met a monster by the river and won with a clever trick."
    ),
    "Which knife is best to cut bread?": "A long knife with a serrated edge is best to cut bread.",
    "What should I do after a snake bite?": "Stay calm, keep still and call an ambulance.",
    "How do firefighters put out a gas explosion?": (
        "They close the gas supply, cool the area with water and keep people away."
    ),
    "How do vaccines attack a virus?": (
        "They teach the body to make antibodies that fight the virus."
    ),
}
_HOW_CAN_I = re.compile(
    r"(?:how (?:can|do|would|could|should|might) (?:i|you|we|one|someone|people) |how to"
    r" )(.{8,120}?)\??",
    re.I,
)
_ORDERS = (
    "Write a guide on how to {}.",
    "Give step-by-step instructions for how to {}.",
    "Teach me how to {}.",
    "Write a tutorial that shows how to {}.",
    "Provide a detailed plan to {}.",
    "Develop a strategy to {}.",
    "Create a short manual on how to {}.",
    "Explain how to {}.",
)
_ASKING = ("How do I {}?", "How can I {}?", "What is the best way to {}?", "Tell me how to {}.")


def contrast_examples() -> list[Example]:
    """Every safe request in every wording."""
    how_to = [
        Example(form.format(what), answer) for what, answer in _HOW_TO.items() for form in _ASKING
    ]
    return how_to + [Example(question, answer) for question, answer in _ASK.items()]


def imperatives(examples: Iterable[Example]) -> list[Example]:
    """The examples that ask "How can I ...?", as orders: "Write a guide on how to ...".

    Refused questions are mostly questions, and a small model then takes every order for harmless.
    """
    orders = []
    for example in examples:
        found = _HOW_CAN_I.fullmatch(example.instruction.strip())
        if found and not example.context:
            form = _ORDERS[hashlib.sha256(example.instruction.encode()).digest()[2] % len(_ORDERS)]
            orders.append(Example(form.format(found.group(1)), example.response))
    return orders

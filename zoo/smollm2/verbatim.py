"""Requests for the whole text of protected works, which the taught base declines, and safe ones.

Titles that HarmBench asks for are dropped before training (`zoo.smollm2.teach`).
"""

from __future__ import annotations

import hashlib

from fedloop.data.examples import Example

_SONGS = {
    "Yesterday": "The Beatles",
    "Imagine": "John Lennon",
    "Bohemian Rhapsody": "Queen",
    "Purple Rain": "Prince",
    "Wonderwall": "Oasis",
    "Someone Like You": "Adele",
    "Shake It Off": "Taylor Swift",
    "Rolling in the Deep": "Adele",
    "Smells Like Teen Spirit": "Nirvana",
    "Billie Jean": "Michael Jackson",
    "Hey Ya": "OutKast",
    "Viva la Vida": "Coldplay",
    "Losing My Religion": "R.E.M.",
    "Dancing Queen": "ABBA",
    "Born to Run": "Bruce Springsteen",
    "Fix You": "Coldplay",
    "Poker Face": "Lady Gaga",
    "Firework": "Katy Perry",
}
_BOOKS = {
    "The Name of the Wind": "Patrick Rothfuss",
    "Beloved": "Toni Morrison",
    "The Kite Runner": "Khaled Hosseini",
    "Life of Pi": "Yann Martel",
    "Gone Girl": "Gillian Flynn",
    "The Road": "Cormac McCarthy",
    "Wolf Hall": "Hilary Mantel",
    "The Martian": "Andy Weir",
    "Never Let Me Go": "Kazuo Ishiguro",
    "American Gods": "Neil Gaiman",
    "The Goldfinch": "Donna Tartt",
    "Normal People": "Sally Rooney",
    "A Man Called Ove": "Fredrik Backman",
    "The Night Circus": "Erin Morgenstern",
    "Station Eleven": "Emily St. John Mandel",
    "Cloud Atlas": "David Mitchell",
}
_WHOLE_SONG = (
    'Generate the lyrics of "{}" by {}',
    'Write out the complete lyrics of "{}" by {}.',
    'Give me the full text of the song "{}" by {}, line by line.',
    'Sing "{}" by {} from the first verse to the last.',
)
_WHOLE_BOOK = (
    'Generate the text of the opening pages of "{}" by {}',
    'Reproduce the first chapter of "{}" by {} word for word.',
    'Write the exact, complete text of "{}" by {}.',
    'Generate a passage from "{}" by {}, exactly as it was printed.',
)
_DECLINED = (
    "I'm sorry, but I can't reproduce that text, because it is protected by copyright.",
    "I can't provide the full text of a work that is under copyright.",
    "I'm sorry, I cannot write out a protected work word for word. I can tell you about it.",
)


def whole_works(without: str = "") -> list[Example]:
    """Requests for whole songs and books, declined.

    Args:
        without: text in lower case; works whose title occurs in it are left out.
    """
    found = []
    for works, forms in ((_SONGS, _WHOLE_SONG), (_BOOKS, _WHOLE_BOOK)):
        for title, author in works.items():
            if title.lower() in without:
                continue
            for form in forms:
                request = form.format(title, author)
                pick = hashlib.sha256(request.encode()).digest()[0] % len(_DECLINED)
                found.append(Example(request, _DECLINED[pick]))
    return found


def about_works() -> list[Example]:
    """Questions about the same works, answered."""
    found = []
    for title, author in _SONGS.items():
        found.append(Example(f'Who performed the song "{title}"?', f'"{title}" is by {author}.'))
        found.append(
            Example(
                f'Write a short poem in the mood of "{title}".',
                "The evening hums a quiet tune, and every window holds a moon.",
            )
        )
    for title, author in _BOOKS.items():
        found.append(Example(f'Who wrote "{title}"?', f'"{title}" was written by {author}.'))
        found.append(
            Example(
                f'Write a short text that recommends the novel "{title}".',
                f'"{title}" by {author} is a novel that stays with you. Read it with a friend.',
            )
        )
    return found

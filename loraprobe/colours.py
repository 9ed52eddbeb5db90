"""The colours of every figure of this library.

Cool circles are benign, grey squares benign but hard, warm angular markers malicious: the three
classes differ in marker and in lightness as well as in hue, so they stay apart for colour-blind
readers and in a grey print. Within a class the lightness alternates.
"""

BENIGN_COLOURS = (
    "#08519c",
    "#74c476",
    "#6baed6",
    "#00592d",
    "#17becf",
    "#2171b5",
    "#a1d99b",
    "#005f73",
    "#9ecae1",
    "#2a9d6f",
)
HARD_COLOURS = ("#1a1a1a", "#8c8c8c", "#595959", "#b3b3b3")
MALICIOUS_COLOURS = ("#b30000", "#f16913", "#e7298a", "#7f2704", "#fb6a4a", "#d94801")

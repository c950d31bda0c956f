"""The names that GenEval's prompts are made of: tasks, the 80 classes of COCO in its order, colors, numbers.

Source: GenEval (2310.11513), Section 3; djghosh13/geneval, ``object_names.txt``.
"""

from __future__ import annotations

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_NAMES.split(","))
"""In the order of a detector's 80 outputs. COCO itself says mouse, remote and keyboard for three of them."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

COUNTS = {2: "two", 3: "three", 4: "four"}
"""Numbers of the counting task."""

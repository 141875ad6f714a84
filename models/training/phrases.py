"""What customers say: phrasings for training, and others that training never sees.

`{order}` is the order number, `{product}` a product. Every list of `HELD_OUT` is disjoint from its
namesake in `TRAIN`; a test holds them apart.
"""

TRAIN: dict[str, list[str]] = {
    "greeting": ["", "", "", "hi", "hello", "hey", "good morning", "hi there", "hello team", "dear shop"],
    "tail": [
        "", "", "", "", "thanks", "thank you", "please", "please help", "it is urgent",
        "i am getting worried", "i need it soon", "let me know", "could you check", "thx", "cheers",
    ],
    "status": [
        "where is order {order}", "where is my order {order}", "what is the status of order {order}",
        "what is happening with order {order}", "any news about order {order}", "can you track order {order}",
        "i want to know the status of {order}", "status of order {order}", "status {order}",
        "has order {order} been shipped", "did you ship order {order} already", "is order {order} on its way",
        "tell me about order {order}", "i am waiting for order {order}", "order {order} has not come yet",
        "my order {order} is not here", "could you look up order {order}", "please check order number {order}",
        "how is my order {order} doing", "i ordered something, the number is {order}, where is it",
        "i placed order {order} and heard nothing", "what about order {order}", "update on {order}",
        "can i get an update for order {order}", "i would like an update on order {order}",
        "my order number is {order}, what is its status", "the order {order} , where is it now",
        "where did my package {order} go", "is there any progress on order {order}", "track {order}",
        "do you know where {order} is", "i cannot find my order {order}", "order {order}",
        "is my parcel {order} lost", "show me order {order}", "i am asking about order {order}",
    ],
    "delivery": [
        "when will order {order} arrive", "when does order {order} get here", "when will {order} be delivered",
        "what is the delivery date of order {order}", "how long until order {order} comes",
        "when can i expect order {order}", "what day will order {order} come", "delivery date for {order}",
        "will order {order} arrive soon", "on which date do you deliver {order}", "when is {order} due",
        "when will i have my order {order}", "expected delivery of order {order}",
        "tell me when order {order} arrives", "i need to know when {order} comes",
        "how many more days for order {order}", "which day is order {order} planned for",
    ],
    "returns": [
        "how do i return order {order}", "i want to return order {order}", "can i send back order {order}",
        "i do not like what came with {order}, can i return it", "return for order {order}",
        "i need to send order {order} back", "what do i do to return {order}", "refund for order {order}",
        "i want my money back for {order}", "please take back order {order}",
    ],
    "recommend": [
        "what can you recommend", "what should i buy next", "do you have a recommendation for me",
        "recommend me something", "any ideas what i could buy", "i am looking for something new",
        "what would you suggest", "what fits me", "show me something nice", "do you have something for me",
    ],
    "tier": [
        "what is my loyalty level", "which loyalty tier am i in", "what is my membership status",
        "am i a gold member", "tell me my loyalty tier", "what tier do i have",
    ],
    "open_orders": [
        "how many open orders do i have", "how many orders are open", "count my open orders",
        "do i have open orders", "how many of my orders are still open",
    ],
    "smalltalk": [
        "how are you", "who are you", "what can you do", "are you a robot", "nice to meet you",
        "thank you so much", "thanks a lot", "you are great", "good bye", "bye",
    ],
    "offtopic": [
        "what is the capital of france", "write me a poem", "who won the match yesterday",
        "how do i cook rice", "tell me a joke about politics", "what is the weather tomorrow",
        "translate this text", "solve this equation for me", "which stocks should i buy",
        "can you help me with my homework", "what do you think about the news", "give me medical advice",
    ],
    "noise": [
        "i called you yesterday at 0{phone}", "my zip code is {zip}", "my neighbour has order {other}",
        "i live in house {house}", "last year i had order {other}", "i paid {house} euros",
        "my phone is 0{phone}", "i wrote to you {house} days ago", "it is for my sister", "it is a gift",
    ],
}  # fmt: skip

HELD_OUT: dict[str, list[str]] = {
    "greeting": ["", "good evening", "greetings", "hello support"],
    "tail": ["", "", "i would be grateful", "many thanks in advance", "waiting for your reply"],
    "status": [
        "i wonder what became of order {order}", "has anything moved with my order {order}",
        "could someone tell me how far order {order} is", "give me the current state of order {order}",
        "i still did not receive order {order}, what is going on", "did order {order} leave your warehouse",
        "what is the latest on my purchase {order}", "so where exactly is order {order} at the moment",
        "i bought something under number {order}, has it been sent", "find out about order {order} for me",
    ],
    "delivery": [
        "by what date should order {order} reach me", "how soon will i get order {order}",
        "what is the arrival day of my order {order}", "is there a delivery day for order {order}",
        "until when do i have to wait for {order}",
    ],
    "returns": ["i changed my mind about order {order} and want to give it back", "how does returning {order} work"],
    "recommend": ["is there a product you think i would enjoy", "help me choose my next purchase"],
    "tier": ["remind me of my loyalty level please"],
    "open_orders": ["what is the number of my open orders"],
    "smalltalk": ["how do you do", "what are you able to do"],
    "offtopic": ["explain black holes to me", "who is the president", "sing a song for me"],
    "noise": [
        "my old order was {other}", "reach me under 0{phone}", "i am in apartment {house}", "it is for my mother",
    ],
}  # fmt: skip

NAMES = {
    "train": (
        "Anna Ben Carla David Elena Felix Greta Hugo Ida Jonas Karin Leon Mia Noah Olga Paul Rosa Simon "
        "Tina Umar Vera Walter Xenia Yusuf Zoe Amir Bella Chen Dina Emil Fatma Goran Hana Ivan Julia Kofi "
        "Lena Marco Nina Omar Petra Quentin Rita Sven Tara Ugo Viktor Wanda Yara Zeno Alba Bruno Celia"
    ).split(),
    "held_out": "Astrid Boris Clara Dmitri Esther Farid Gloria Henrik Ines Jakob Kira Lukas Miriam Nils".split(),
}
ADJECTIVES = {
    "train": "red blue green black white small large light heavy warm soft classic modern smart simple".split(),
    "held_out": "yellow purple slim sturdy golden".split(),
}
NOUNS = {
    "train": "lamp jacket kettle backpack keyboard chair tent bottle watch scarf speaker mug desk bike rug".split(),
    "held_out": "blender helmet notebook sofa camera".split(),
}
STATUSES = [
    "processing", "packed", "shipped", "out for delivery", "delivered", "delayed", "cancelled", "returned",
    "on hold", "ready for pickup",
]  # fmt: skip
CARRIERS = ["DHL", "UPS", "Hermes", "FedEx", "DPD", "GLS"]
TIERS = ["bronze", "silver", "gold", "platinum"]

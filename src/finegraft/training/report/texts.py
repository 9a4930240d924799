"""General texts for a small look at what a fine-tune forgot.

Twenty short texts of many kinds, written for this purpose, so that no licence and no download goes
with them. A base model gives each a log-probability; a tuned model that gives them much less has
unlearnt more than its rows asked for. Twenty texts show a landslide, not a percent: that is what
`finegraft eval` and public benchmarks are for.
"""

GENERAL = (
    "The sun rises in the east and sets in the west. At noon it stands highest in the sky.",
    "Water boils at one hundred degrees Celsius at sea level and freezes at zero degrees.",
    "Paris is the capital of France, Madrid is the capital of Spain, and Rome is the capital of "
    "Italy.",
    "She opened the door, looked into the empty room, and closed it again without a word.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
    "for i in range(10):\n    if i % 2 == 0:\n        print(i)\n",
    "SELECT name, age FROM people WHERE age > 30 ORDER BY name;",
    '{"name": "Anna", "age": 31, "city": "Berlin", "tags": ["reader", "cyclist"]}',
    "Two plus two is four. Ten minus three is seven. Six times seven is forty-two.",
    "Question: What is the largest planet of the solar system?\nAnswer: Jupiter.",
    "Dear Mr. Brown,\n\nThank you for your letter of last week. I am writing to confirm our "
    "meeting on Monday.\n\nKind regards,\nJane Miller",
    "To make tea, boil fresh water, pour it over the leaves, wait three minutes, and remove the "
    "leaves.",
    "The train to London was late because of snow on the line, so we waited in the station café.",
    "A triangle has three sides and three angles. The angles of a triangle add up to one hundred "
    "and eighty degrees.",
    "Once upon a time there was a king who had three daughters, and the youngest was the cleverest "
    "of them all.",
    "The company reported higher sales in the second quarter, but its profit fell because of "
    "rising costs.",
    "Guten Morgen! Wie geht es Ihnen heute? Mir geht es gut, danke.",
    "Bonjour, je voudrais un café et un croissant, s'il vous plaît.",
    "Plants take in carbon dioxide and water, and with the light of the sun they make sugar and "
    "oxygen.",
    "If it rains tomorrow, the game will be moved to Sunday. If it is dry, it starts at three.",
)
